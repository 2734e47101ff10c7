""".json: a list of objects, {"data": [objects]}, or objects one after another. Objects are read one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import starmap
from pathlib import Path
from typing import Any

from mlx_lora.config import Data
from mlx_lora.data.readers import decode
from mlx_lora.data.readers.base import Note, Raw, Unreadable
from mlx_lora.data.readers.json_values import Scanner

WANTED = 'a .json file holds one list of rows, or {"data": [rows]}'


def rows(file: Path, settings: Data, note: Note) -> Iterator[Raw]:
    with decode.open_text(file, note) as text:
        scanner = Scanner(text)
        start = scanner.peek()
        if start == "[":
            yield from starmap(row, scanner.elements())
            scanner.end()
        elif start == "{":
            yield from _of_object(scanner, note)
        elif start:
            raise Unreadable(f"{WANTED}, this begins with something else")


def first(file: Path) -> Any:
    """The first element of a file that holds a list, None for other files."""
    try:
        with decode.open_text(file, lambda _: None) as text:
            scanner = Scanner(text)
            if scanner.peek() == "[":
                return next(scanner.elements(), (0, None))[1]
    except Unreadable:
        pass
    return None


def _of_object(scanner: Scanner, note: Note) -> Iterator[Raw]:
    line, found, members = scanner.line, False, {}
    for key in scanner.members():
        if key == "data" and scanner.peek() == "[":
            found = True
            yield from starmap(row, scanner.elements())
        elif found:
            scanner.value()
        else:
            members[key] = scanner.value()
    if not found and scanner.peek() == "{":
        note("holds a row a line, read like .jsonl")
        yield Raw(line, members)
        while scanner.peek():
            line = scanner.line
            yield row(line, scanner.value())
        return
    scanner.end()
    if not found:
        raise Unreadable(f"{WANTED}, this is one object")


def row(line: int, value: Any) -> Raw:
    """A JSON value as a row, which must be an object."""
    if isinstance(value, dict):
        return Raw(line, value)
    return Raw(line, None, f"a row is a JSON object, this is {type(value).__name__}")
