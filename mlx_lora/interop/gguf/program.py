"""llama.cpp, by the Python package `xllamacpp`, in a process of its own.

It computes in float32 as far as the file lets it. On some files that it doesn't take it ends its process, which is an
error here.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_lora.errors import ModelError
from mlx_lora.machine import confined

PACKAGE = "xllamacpp"
HOW = f"pip install {PACKAGE}"
Step = tuple[int, dict[int, float]]


def installed() -> bool:
    """Whether llama.cpp can be run here."""
    return find_spec(PACKAGE) is not None


def top_tokens(
    file: Path,
    prompts: Sequence[Sequence[int]],
    count: int = 100,
    adapter: Path | None = None,
    *,
    on_prompt: Callable[[], None] = lambda: None,
) -> list[dict[int, float]]:
    """Log-probabilities in nats, by token id, of the `count` likeliest tokens after each prompt of token ids.

    `file` is a GGUF model, `adapter` a GGUF adapter for it. Raises ModelError where llama.cpp isn't installed and where
    it doesn't take the file.
    """
    steps = continuations(file, prompts, 1, count=count, adapter=adapter, on_prompt=on_prompt)
    return [generated[0][1] for generated in steps]


def continuations(
    file: Path,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    *,
    count: int = 10,
    adapter: Path | None = None,
    on_prompt: Callable[[], None] = lambda: None,
) -> list[list[Step]]:
    """Greedy tokens after each prompt, at most `tokens`, each with the log-probabilities of the `count` likeliest.

    An end token is the last of them; where it would be the first there are none.
    """
    if not installed():
        raise ModelError(f"llama.cpp can't be run here: the package {PACKAGE} isn't installed", hint=HOW)
    longest = max(map(len, prompts), default=0) + tokens
    request = {
        "file": str(Path(file).resolve()),
        "adapter": None if adapter is None else str(Path(adapter).resolve()),
        "context": max(256, -(-longest // 256) * 256),
        "prompts": [list(map(int, prompt)) for prompt in prompts],
        "tokens": tokens,
        "count": count,
    }
    found = []
    for steps in _answers(request, Path(file)):
        found.append([(int(chosen), {int(token): float(value) for token, value in top}) for chosen, top in steps])
        on_prompt()
    return found


def _answers(request: dict[str, Any], file: Path) -> Iterator[list[Any]]:
    with tempfile.TemporaryDirectory() as directory, _process(directory) as process:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        for _ in request["prompts"]:
            line = process.stdout.readline()
            answer = json.loads(line) if line else {"error": f"it ended with code {process.wait()}"}
            if isinstance(answer, dict):
                where = file if request["adapter"] is None else f"{file} with {request['adapter']}"
                raise ModelError(f"llama.cpp doesn't run {where}: {answer['error']}")
            yield answer


@contextmanager
def _process(directory: str) -> Iterator[Any]:
    process = confined.start(Path(__file__).with_name("llama_worker.py"), directory=directory)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]
