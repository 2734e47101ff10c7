"""Rows that are to be answered: a prompt or a conversation, what to ask with, and whatever else a row has.

Files of rows come through the readers of training data; a plain text file has one prompt a line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_lora import files
from mlx_lora.config import Data
from mlx_lora.data import readers
from mlx_lora.data.example import checked_message, tools_of
from mlx_lora.data.read import check_text
from mlx_lora.data.readers import decode
from mlx_lora.data.readers.base import Raw, Unreadable
from mlx_lora.errors import DataError, Problem

TEXTS = (".txt", ".md", "")
WANTED = "a row needs `prompt` (a text) or `messages` (a conversation that ends with the user's turn)"


@dataclass(frozen=True)
class PromptRow:
    """A row of a file. `fields` is all of it, as it stands there; `problem` is why it can't be asked, or None.

    `index` counts rows from 0, `line` lines from 1. `messages` are checked; `named` is whether the row says which
    adapter answers, None for the base.
    """

    index: int
    line: int
    fields: dict[str, Any]
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[Any, ...] = ()
    named: bool = False
    adapter: str | None = None
    max_tokens: int | None = None
    problem: str | None = None

    @property
    def text(self) -> str:
        """The last message's text."""
        return str(self.messages[-1]["content"])


@dataclass
class Scanned:
    """What a file holds: rows, those that have no problem, and the names of adapters in them."""

    rows: int = 0
    sound: int = 0
    adapters: set[str] = field(default_factory=set)


def scan(file: Path) -> Scanned:
    """Read a file to its end. Raises DataError for one that can't be read, or has no row that can be asked."""
    found, first = Scanned(), None
    for row in rows(file):
        found.rows += 1
        if row.problem is None:
            found.sound += 1
        elif first is None:
            first = Problem(str(file), row.line, row.problem)
        if row.adapter is not None:
            found.adapters.add(row.adapter)
    if not found.sound:
        raise DataError([first or Problem(str(file), 0, "has no rows")], hint=WANTED)
    return found


def rows(file: Path) -> Iterator[PromptRow]:
    """The rows of a file, one at a time; lines without anything on them are none.

    Raises DataError where the file, or the rest of it, can't be read.
    """
    for index, (line, found, problem, _) in enumerate(_raw(file)):
        if found is None and line == 0:
            raise DataError([Problem(str(file), 0, str(problem))], hint=f"JSON lines or a text file; {WANTED}")
        if found is None:
            yield PromptRow(index, line, {}, problem=problem)
            continue
        try:
            yield _row(index, line, found)
        except ValueError as error:
            yield PromptRow(index, line, found, problem=str(error))


def _raw(file: Path) -> Iterator[Raw]:
    if readers.ending(file) not in TEXTS:
        yield from readers.rows(file, Data(), lambda text: None)
        return
    try:
        if fault := files.fault(file):
            raise Unreadable(fault)
        for number, line in decode.lines(file, lambda text: None):
            if line.strip():
                yield Raw(number, {"prompt": line.rstrip("\r\n")})
    except Unreadable as error:
        yield Raw(0, None, str(error))
    except OSError as error:
        yield Raw(0, None, f"can't be read ({error.strerror or type(error).__name__})")


def _row(index: int, line: int, fields: dict[str, Any]) -> PromptRow:
    """A row that can be asked. Raises ValueError saying what is wrong with it."""
    check_text(fields)
    adapter, most = fields.get("adapter"), fields.get("max_tokens")
    if adapter is not None and not (isinstance(adapter, str) and adapter):
        raise ValueError(f"'adapter' is {adapter!r}, a name or null is needed")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise ValueError(f"'max_tokens' is {most!r}, a whole number above 0 is needed")
    messages = _messages(fields)
    return PromptRow(index, line, fields, messages, tuple(tools_of(fields)), "adapter" in fields, adapter, most)


def _messages(fields: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    given = fields.get("messages")
    if given is None:
        prompt = fields.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"'prompt' is {'empty' if isinstance(prompt, str) else 'missing'}: {WANTED}")
        return ({"role": "user", "content": prompt},)
    if not isinstance(given, list) or not given:
        raise ValueError(f"'messages' is not a list of messages: {WANTED}")
    messages = tuple(checked_message(message, f"message {number}") for number, message in enumerate(given, start=1))
    if messages[-1]["role"] not in ("user", "tool"):
        raise ValueError(f"the last message is the {messages[-1]['role']}'s, there is nothing to answer")
    return messages
