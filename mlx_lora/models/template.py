"""A conversation through a tokenizer's chat template, in a process of its own that can be stopped.

A template comes with a model and is a program. transformers runs it in jinja's sandbox, but lets it run for ever and
write without end, and a sandbox inside an interpreter has been escaped from before. No budget inside the interpreter
covers time and memory (one multiplication of a text can take all memory, and jinja computes constants while it
compiles), and signals reach the main thread only. So a worker renders, one for this process and all its templates. It
is confined (`machine.confined`: no files, no network, no other process), and killed when it takes too long or too much
memory; the text it answers with is what becomes tokens. Nothing here knows of masks or rows.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import psutil
from transformers import PreTrainedTokenizerBase

from mlx_lora.errors import ModelError
from mlx_lora.machine import confined

# For one conversation: seconds, bytes of memory over what the worker starts with, and characters of text.
MOST_SECONDS, MOST_MEMORY, MOST_CHARACTERS = 10.0, 1 << 29, 16_000_000
# The worker imports transformers first.
START_SECONDS = 120.0
_GLANCE = 0.02
_SCRIPT = Path(__file__).with_name("template_worker.py")


def render(tokenizer: Any, messages: Iterable[dict[str, Any]], tools: Iterable[Any], *, prompt: bool) -> list[int]:
    """Token ids of `messages` as the tokenizer's chat template writes them; with `prompt`, up to the next answer.

    Raises ValueError where the template refuses the conversation, ModelError where it takes more than its limits.
    """
    messages, known = list(messages), list(tools) or None
    if _rendered_by_code(tokenizer):
        return list(tokenizer.apply_chat_template(messages, tools=known, add_generation_prompt=prompt))
    request = {
        **tokenizer.special_tokens_map,
        "enable_thinking": tokenizer.has_thinking,
        "conversations": [[{key: value for key, value in each.items() if value is not None} for each in messages]],
        "tools": known,
        "chat_template": tokenizer.get_chat_template(tools=known),
        "add_generation_prompt": prompt,
    }
    with _lock:
        text = _worker.ask(request)
    return list(tokenizer.encode(text, add_special_tokens=False))


def _rendered_by_code(tokenizer: Any) -> bool:
    """Whether mlx_lm or transformers have code of their own for this tokenizer's chats, instead of a template."""
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    renders = getattr(type(inner), "apply_chat_template", None)
    return getattr(tokenizer, "_chat_template", None) is not None or (
        renders is not PreTrainedTokenizerBase.apply_chat_template
    )


class _Worker:
    """The process that renders: started when first needed, again after it was killed, and gone with this one."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.memory = 0

    def ask(self, request: dict[str, Any]) -> str:
        """The text of a request. Raises ValueError with the template's own error, ModelError over a limit."""
        try:
            process = self.started()
            _send(process, request)
            answer = _received(process, MOST_SECONDS, self.memory + MOST_MEMORY)
        except BaseException:  # over a limit, or interrupted: its answer would be taken for the next one's
            self.stop()
            raise
        if "error" in answer:
            raise ValueError(answer["error"])
        if "characters" in answer:
            raise ModelError(
                f"the chat template wrote {answer['characters']} characters; the limit is {MOST_CHARACTERS}"
            )
        return str(answer["text"])

    def started(self) -> subprocess.Popen[bytes]:
        """The running process; its imports are done."""
        if self.process is None or self.process.poll() is not None:
            self.stop()
            with tempfile.TemporaryDirectory(prefix="mlx-lora-") as empty:
                # This process is quicker to stop it; the worker's own limit counts when this one was killed.
                self.process = confined.start(_SCRIPT, MOST_CHARACTERS, MOST_SECONDS + 1, directory=empty)
                _received(self.process, START_SECONDS, None)
            self.memory = _memory(self.process)
        return self.process

    def stop(self) -> None:
        """Kill the process, if there is one, and take back what it holds."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with suppress(OSError):  # what was still to be written has no reader
                    pipe.close()  # type: ignore[union-attr]
            self.process = None


def _send(process: subprocess.Popen[bytes], request: dict[str, Any]) -> None:
    content = json.dumps(request).encode()
    assert process.stdin is not None
    try:
        process.stdin.write(len(content).to_bytes(8, "little") + content)
        process.stdin.flush()
    except BrokenPipeError:
        raise ModelError("the process that renders chat templates has ended", hint="try again") from None


def _received(process: subprocess.Popen[bytes], seconds: float, memory: int | None) -> dict[str, Any]:
    """The worker's next answer. Raises ModelError when it takes longer, grows past `memory` bytes, or ends."""
    assert process.stdout is not None
    content, deadline = bytearray(), time.monotonic() + seconds
    while len(content) < 8 or len(content) < 8 + int.from_bytes(content[:8], "little"):
        if wait([process.stdout.fileno()], _GLANCE):
            piece = process.stdout.read1(1 << 20)  # type: ignore[attr-defined]
            if not piece:
                raise ModelError("the process that renders chat templates has ended", hint="try again")
            content += piece
        elif time.monotonic() > deadline:
            raise ModelError(f"the chat template takes more than {seconds:.0f} seconds for one conversation")
        elif memory is not None and _memory(process) > memory:
            raise ModelError(f"the chat template takes more than {MOST_MEMORY >> 20} MB for one conversation")
    answer: dict[str, Any] = json.loads(content[8:])
    return answer


def _memory(process: subprocess.Popen[bytes]) -> int:
    """Bytes of memory that a process has; 0 when it just ended, as its pipe will tell."""
    try:
        return int(psutil.Process(process.pid).memory_info().rss)
    except psutil.Error:
        return 0


_worker = _Worker()
_lock = threading.Lock()
atexit.register(_worker.stop)
