"""The file that answers of many prompts are written to: a line of JSON each, as they end, in input order at the end.

What is written stays: a run that is killed goes on with the rows that have no line yet. What the answers are made of is
in a file beside it (`NAME.unfinished`) until the last one is there, so that answers to other questions, or of another
adapter, never get mixed in.
"""

from __future__ import annotations

import fcntl
import json
import os
from array import array
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_lora import paths
from mlx_lora.errors import MlxLoraError, NameTaken
from mlx_lora.ui import json_text

UNFINISHED = ".unfinished"
AGAIN = "--force begins again"


class Answers:
    """Answers at `path`; `done` says which indices are there. Use as a context manager.

    `made_of` is what the answers follow from, as words and JSON values: the same words name what has changed. Raises
    NameTaken where `path` exists and is complete, and MlxLoraError where it is unfinished and made of something else,
    unless `force`, and where another process is writing.
    """

    def __init__(self, path: Path, rows: int, made_of: dict[str, Any], *, force: bool = False):
        self.path, self.rows = path, rows
        self.state = path.with_name(path.name + UNFINISHED)
        self.done, self.failed = bytearray(rows), 0
        goes_on = not force and self._goes_on(made_of)
        self._file = self._opened()
        try:
            if goes_on:
                self._read()
            else:
                with paths.created(self.state) as state:
                    state.write(json.dumps(made_of).encode())
                paths.synchronize(self.state)
                self._file.truncate(0)
            self._file.seek(0, os.SEEK_END)
        except BaseException:
            self._file.close()
            raise
        self.before = sum(self.done)

    def _goes_on(self, made_of: dict[str, Any]) -> bool:
        """Whether there is an unfinished file that is made of the same things."""
        if not self.state.exists():
            if os.path.lexists(self.path):
                raise NameTaken(f"{self.path} exists", hint="choose another name, or --force to replace it")
            return False
        try:
            before = json.loads(self.state.read_bytes())
        except ValueError:
            before = {}
        names = dict.fromkeys([*made_of, *(before if isinstance(before, dict) else {})])
        changed = [name for name in names if before.get(name) != json.loads(json.dumps(made_of.get(name)))]
        if changed:
            raise MlxLoraError(
                f"{self.path} is unfinished, and {', '.join(changed)} changed since it was begun",
                hint=f"run the command that began it to go on, or {AGAIN}",
            )
        return True

    def _opened(self) -> Any:
        """The file, held by this process alone."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise MlxLoraError(f"another process is writing {self.path}", hint="wait for it, or end it") from None
        return file

    def _read(self) -> None:
        """Note which rows are there, and cut off a line that isn't whole: the process was killed while it wrote it."""
        end = 0
        for start, line in _lines(self._file):
            try:
                found = json.loads(line)
                index = found["index"]
                if not line.endswith(b"\n") or not 0 <= index < self.rows:
                    break
            except (ValueError, TypeError, KeyError):
                break
            if not self.done[index]:
                self.failed += "error" in found
            self.done[index] = 1
            end = start + len(line)
        self._file.truncate(end)

    def write(self, index: int, values: dict[str, Any]) -> None:
        """Add the line of a row; it has left the process when this returns."""
        self._file.write((json_text({"index": index} | values) + "\n").encode())
        self._file.flush()
        self.done[index] = 1
        self.failed += "error" in values

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def complete(self) -> None:
        """All rows are there: bring them into input order, in one rename."""
        starts = array("q", [-1]) * self.rows
        self._file.seek(0)
        for start, line in _lines(self._file):
            starts[json.loads(line)["index"]] = start
        temporary = self.path.with_name(f".{self.path.name}.sorted")
        with suppress(OSError), paths.created(temporary) as ordered:
            for start in starts:
                self._file.seek(start)
                ordered.write(self._file.readline())
            ordered.flush()
            os.fsync(ordered.fileno())
            os.replace(temporary, self.path)
        temporary.unlink(missing_ok=True)  # where the disk is full: the lines are there, each with its index
        self.state.unlink(missing_ok=True)


def _lines(file: Any) -> Iterator[tuple[int, bytes]]:
    start = 0
    for line in file:
        yield start, line
        start += len(line)
