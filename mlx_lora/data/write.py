"""Examples as rows of a .jsonl file: `{"messages": […], "tools"?}`, or `{"text": …}`.

A file is written under another name beside its own and takes its name when it is complete, readable by the user alone.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mlx_lora import paths
from mlx_lora.data.example import Example, as_written
from mlx_lora.errors import MlxLoraError, NameTaken

ENDING = ".jsonl"


def row(example: Example) -> dict[str, Any]:
    """An example as a row that `data/sources` reads back."""
    if example.text is not None:
        return {"text": example.text}
    tools = {"tools": list(example.tools)} if example.tools else {}
    return {"messages": [as_written(message) for message in example.messages], **tools}


def line(example: Example) -> bytes:
    """An example as a line of a .jsonl file; letters of any script as they are."""
    return json.dumps(row(example), ensure_ascii=False).encode() + b"\n"


def learns_more(example: Example) -> bool:
    """Whether the written row learns answers that this one has as context: messages have no mark for one turn alone."""
    given = example.messages[: example.prompt_messages]
    return example.mask == "completion" and any(message["role"] == "assistant" for message in given)


def check_targets(targets: Iterable[Path], *, force: bool, sources: Iterable[Path] = ()) -> None:
    """Raise NameTaken, MlxLoraError where a file may not be written; worth knowing before the work is done.

    A file that is being read is never replaced, not even with `force`.
    """
    read = [source.resolve() for source in sources]
    for target in targets:
        if target.suffix != ENDING:
            raise MlxLoraError(f"{target} doesn't end in {ENDING}", hint=f"rows are written as {ENDING}")
        if target.resolve() in read:
            raise NameTaken(f"{target} is the file that is read", hint="choose another name")
        if target.is_dir():
            raise NameTaken(f"{target} is a directory", hint="name a file")
        if os.path.lexists(target) and not force:
            raise NameTaken(f"{target} exists", hint="choose another name, or --force to replace it")


@contextmanager
def files_written(targets: Iterable[Path]) -> Iterator[dict[Path, BinaryIO]]:
    """Files to write to, by target; all take their names when the block succeeds, and none when it fails."""
    with ExitStack() as stack:
        opened: dict[Path, BinaryIO] = {}
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            opened[target] = stack.enter_context(paths.created(folder / target.name))
        yield opened
        for file in opened.values():
            file.flush()
            os.fsync(file.fileno())
        for target, file in opened.items():
            os.replace(file.name, target)
        for folder in {target.parent for target in opened}:
            paths.synchronize(folder)
