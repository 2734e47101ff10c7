"""Files become examples one at a time, with every problem by file and line. No tokens here.

A path is one file, a folder holding train, valid and test files, or a folder of documents. `readers` knows the kinds of
files, `columns` what the keys of a row mean, `sources` the shapes of rows. The first row sets the format, and a row of
another shape is a problem, not a guess.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mlx_lora import files
from mlx_lora.config import Data
from mlx_lora.data import columns, readers
from mlx_lora.data.example import Example, without_images
from mlx_lora.data.sources import FORMATS, preference
from mlx_lora.data.splits import find_splits
from mlx_lora.data.system import with_system
from mlx_lora.errors import Problem

__all__ = ["HINT", "Item", "Source", "Stream", "find_splits", "read", "sha256", "stream"]

HINT = "mlx-lora data check PATH shows every problem"


class Item(NamedTuple):
    """A row as an example, or its problem. `file` is set where a folder is read."""

    line: int
    example: Example | None
    problem: Problem | None
    file: Path | None = None


class Stream:
    """The rows of a file, read anew each time it is iterated over; no more than a few are held.

    While it is iterated over, `format`, `columns` (the column of each role) and `notes` (what people should know of how
    the file was read) are filled.
    """

    def __init__(self, file: Path, settings: Data):
        self.file, self.settings = file, settings
        self.format: str | None = None
        self.columns: dict[str, str] = {}
        self.notes: list[str] = []

    def __iter__(self) -> Iterator[Item]:
        self.format = None if self.settings.format == "auto" else self.settings.format
        self.columns, self.notes = {}, []
        found: columns.Columns | None = None
        rated: list[int] = []
        rows = 0
        for line, row, problem, file in readers.rows(self.file, self.settings, self._note):
            rows += 1
            if row is not None and not self.settings.columns and preference.matches(row):
                rated.append(line)
                continue
            try:
                if row is None:
                    raise ValueError(problem)
                check_text(row)
                found = found or self._find(row)
                yield Item(line, self._example(found, row), None, file)
            except columns.Unclear as error:
                yield self._problem(line, str(error), file)
                return
            except ValueError as error:
                yield self._problem(line, str(error), file)
        if not rows:
            yield self._problem(0, "is empty")
        elif len(rated) == rows:
            yield self._problem(rated[0], "has rejected answers alone, which wait for preference training")
        elif rated:
            are = "rows with a rejected answer are" if len(rated) > 1 else "row with a rejected answer is"
            self._note(f"{len(rated)} {are} left out, for preference training to come")

    def _find(self, row: dict[str, Any]) -> columns.Columns:
        found = columns.find(row, self.settings)
        self.format, self.columns = found.format, found.roles
        return found

    def _example(self, found: columns.Columns, row: dict[str, Any]) -> Example:
        row = found.row(row)
        example = FORMATS[found.format].parse(without_images(row) if "images" in self.settings.drop else row)
        if example.messages:  # what was text in a cell, or in a call's arguments, is lists and objects now
            _check_depth([*example.messages, *example.tools])
        return with_system(example, self.settings.system) if self.settings.system else example

    def _problem(self, line: int, problem: str, file: Path | None = None) -> Item:
        return Item(line, None, Problem(str(file or self.file), line, problem), file)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def stream(file: Path, settings: Data) -> Stream:
    """The rows of a file, or of a folder of documents, as examples and problems, one at a time."""
    return Stream(file, settings)


@dataclass
class Source:
    """One file's examples; `lines[i]` is where `examples[i]` stands. `format` is None for a file without rows."""

    file: Path
    format: str | None = None
    examples: list[Example] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read(file: Path, settings: Data) -> Source:
    """Every row of a file as an Example; faulty rows become problems instead."""
    source, rows = Source(file), stream(file, settings)
    for item in rows:
        if item.problem is not None:
            source.problems.append(item.problem)
        if item.example is not None:
            source.examples.append(item.example)
            source.lines.append(item.line)
    source.format, source.columns, source.notes = rows.format, rows.columns, rows.notes
    return source


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes; of a folder, of its documents' names and bytes."""
    if path.is_dir():
        digest = hashlib.sha256()
        for file in readers.documents(path):
            digest.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def check_text(row: dict[str, Any]) -> None:
    """Raises ValueError for what no tokenizer takes: nesting without end, and half a character.

    JSON can spell half a character (a lone surrogate).
    """
    for name, value in row.items():
        if not name.isascii():
            _check_characters(name)
        if type(value) is str:
            if not value.isascii():
                _check_characters(value)
        elif isinstance(value, dict | list):
            _check_depth(value)
            _check_characters(json.dumps(value, ensure_ascii=False, default=str))


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds {error.object[error.start]!r}, half a character (a lone surrogate)") from None


def _check_depth(value: Any) -> None:
    if files.too_deep(value):
        raise ValueError("nested too deeply")
