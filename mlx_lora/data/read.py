"""Files become examples, with every problem collected by file and line. No tokens here.

A path is one file, or a folder holding train, valid and test files. Each row is checked on its own: the first row
sets the format, and a row of another shape is a problem, not a guess.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mlx_lora import files, paths
from mlx_lora.config import Data
from mlx_lora.data.example import SHOWN, Example
from mlx_lora.data.sources import FORMATS, detect
from mlx_lora.errors import DataError, Problem

ENDINGS = (".jsonl", ".json")
SPLITS = ("train", "valid", "test")
BETWEEN_ROWS = re.compile(r"[\s,]*")
HINT = "mlx-lora data check PATH shows every problem"


@dataclass
class Source:
    """One file's examples; `lines[i]` is where `examples[i]` stands. `format` is None for a file without rows."""

    file: Path
    format: str | None = None
    examples: list[Example] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def find_splits(path: str | Path) -> dict[str, Path]:
    """The files of a data path by split name. Raises DataError when there are none."""
    root = paths.existing(path)
    if root is None:
        raise DataError([Problem(str(path), 0, "no such file or folder")])
    if not root.is_dir():
        if root.suffix not in ENDINGS and root.suffix not in files.PICKLES:
            raise DataError([Problem(str(root), 0, f"not a {' or '.join(ENDINGS)} file")])
        if found := files.fault(root):
            raise DataError([Problem(str(root), 0, found)])
        return {"train": root}
    splits = {}
    for split in SPLITS:
        named = [root / f"{split}{ending}" for ending in ENDINGS if (root / f"{split}{ending}").exists()]
        if len(named) > 1:
            raise DataError([Problem(str(root), 0, f"has both {named[0].name} and {named[1].name}")], hint="keep one")
        if named:
            splits[split] = named[0]
    if not splits:
        raise DataError(
            [Problem(str(root), 0, "has no train.jsonl, valid.jsonl or test.jsonl")], hint="name one file instead"
        )
    return splits


class Item(NamedTuple):
    """A row: its example, or its problem."""

    line: int
    example: Example | None
    problem: Problem | None


class Stream:
    """The rows of a file one at a time; the attributes are filled on the way."""

    def __init__(self, file: Path, settings: Data):
        self.file, self.settings = file, settings
        self.format: str | None = None
        self.columns: dict[str, str] = {}
        self.notes: list[str] = []

    def __iter__(self) -> Iterator[Item]:
        source = read(self.file, self.settings)
        self.format = source.format
        for line, example in zip(source.lines, source.examples, strict=True):
            yield Item(line, example, None)
        for problem in source.problems:
            yield Item(problem.line, None, problem)


def stream(file: Path, settings: Data) -> Stream:
    return Stream(file, settings)


def read(file: Path, settings: Data) -> Source:
    """Every row of a file as an Example; faulty rows become problems instead."""
    source = Source(file)
    chosen: str | None = None if settings.format == "auto" else settings.format
    for line, row, problem in _rows(file):
        if problem:
            source.problems.append(Problem(str(file), line, problem))
            continue
        try:
            if not isinstance(row, dict):
                raise ValueError(f"a row is a JSON object, this is {type(row).__name__}")
            _check_text(row)
            chosen = chosen or _detect(row)
            module = FORMATS[chosen]
            if not module.matches(row):
                raise ValueError(f"not a row of format {chosen}: its keys are {_keys(row)}")
            example = module.parse(row)
            _check_depth([*example.messages])  # arguments of tool calls were text, and are objects now
            source.examples.append(example)
            source.lines.append(line)
        except ValueError as error:
            source.problems.append(Problem(str(file), line, str(error)))
    source.format = chosen
    if not source.examples and not source.problems:
        source.problems.append(Problem(str(file), 0, "is empty"))
    return source


def sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _detect(row: dict[str, Any]) -> str:
    name = detect(row)
    if name is None:
        raise ValueError(f"no format has the keys {_keys(row)}; known formats: {', '.join(FORMATS)}")
    return name


def _keys(row: dict[str, Any]) -> str:
    """The row's first keys, all together cut to what may be shown of a row."""
    keys = ", ".join(repr(key) for key in list(row)[:6]) or "none"
    return keys if len(keys) <= SHOWN else f"{keys[:SHOWN]}…"


def _rows(file: Path) -> Iterator[tuple[int, Any, str | None]]:
    """(line, row, problem) for each row of a .jsonl file, or of a .json file holding one list."""
    if found := files.fault(file):
        yield 0, None, found
        return
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        yield 0, None, f"can't be read ({error.strerror})"
        return
    except UnicodeDecodeError as error:
        yield error.object.count(b"\n", 0, error.start) + 1, None, f"is not UTF-8 (byte {error.start} of the file)"
        return
    if file.suffix == ".json":
        yield from _json_rows(text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line), None
            except (ValueError, RecursionError) as error:
                yield number, None, f"not valid JSON ({_reason(error)})"


def _json_rows(text: str) -> Iterator[tuple[int, Any, str | None]]:
    try:
        rows = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        problem = f"not valid JSON ({_reason(error)}); a .json file holds one list, rows a line belong in .jsonl"
        yield getattr(error, "lineno", 0), None, problem
        return
    if not isinstance(rows, list):
        yield 0, None, "a .json file holds one list of rows"
        return
    # the list is sound: walk it again for the line each row starts on
    decoder, line, seen, position = json.JSONDecoder(), 1, 0, text.find("[") + 1
    for row in rows:
        position = BETWEEN_ROWS.match(text, position).end()  # type: ignore[union-attr]
        line, seen = line + text.count("\n", seen, position), position
        yield line, row, None
        position = decoder.raw_decode(text, position)[1]


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number with too many digits"


def _check_text(row: dict[str, Any]) -> None:
    """JSON can spell half a character (a lone surrogate), which no tokenizer takes."""
    _check_depth(row)
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds {error.object[error.start]!r}, half a character (a lone surrogate)") from None


def _check_depth(value: Any) -> None:
    if files.too_deep(value):
        raise ValueError("nested too deeply")
