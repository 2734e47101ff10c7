""".csv and .tsv: the first line names the columns. A .csv file's delimiter is what cuts its first lines alike."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from mlx_lora.config import Data
from mlx_lora.data.readers import decode
from mlx_lora.data.readers.base import Note, Raw, Unreadable

DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
SNIFFED = 1 << 16
LONGEST_CELL = 1 << 30


def rows(file: Path, settings: Data, note: Note) -> Iterator[Raw]:
    delimiter, skipped = _delimiter(file)
    if delimiter != "," and not _is_tsv(file):
        note(f"columns are parted by {DELIMITERS.get(delimiter, repr(delimiter))}")
    with decode.open_text(file, note) as text:
        for _ in range(skipped):
            text.readline()
        yield from table((line + skipped, cells) for line, cells in records(text, delimiter))


def table(lines: Iterable[tuple[int, list[Any]]]) -> Iterator[Raw]:
    """Rows by the names in the first line that isn't blank. Raises Unreadable for a name given twice.

    Cells are text. Columns without a name are left out, and so are blank lines.
    """
    names: list[str] | None = None
    for line, cells in lines:
        if not any(map(str.strip, cells)):
            continue
        if names is None:
            names = [cell.strip() for cell in cells]
            if twice := [name for name in names if name and names.count(name) > 1]:
                raise Unreadable(f"has two columns with the name {twice[0][:40]!r}", line)
            continue
        if len(cells) > len(names) and any(map(str.strip, cells[len(names) :])):
            yield Raw(line, None, f"has {len(cells)} cells, and the first line names {len(names)} columns")
            continue
        cells += [""] * (len(names) - len(cells))
        yield Raw(line, {name: cell for name, cell in zip(names, cells, strict=False) if name})


def records(text: TextIO | Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line it begins on, cells) for each record. Raises Unreadable for a quote that isn't closed."""
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        limit = csv.field_size_limit(LONGEST_CELL)  # of the whole process, so it is put back
        try:
            cells = next(reader, None)
        except csv.Error as error:
            problem = "a quote that begins here is not closed" if "end of data" in str(error) else str(error)
            raise Unreadable(f"is not sound CSV ({problem})", line) from None
        finally:
            csv.field_size_limit(limit)
        if cells is None:
            return
        yield line, cells


def _is_tsv(file: Path) -> bool:
    return ".tsv" in [suffix.lower() for suffix in file.suffixes[-2:]]


def _delimiter(file: Path) -> tuple[str, int]:
    """The delimiter, and how many lines stand before the first record: Excel writes `sep=;` there."""
    start = decode.head(file, SNIFFED).lstrip("\ufeff")
    first = start.partition("\n")[0].strip()
    if first.lower().startswith("sep=") and len(first) == 5:
        return first[4], 1
    if _is_tsv(file):
        return "\t", 0
    lines = start.splitlines(keepends=True)
    lines = lines[:-1] if len(lines) > 1 and len(start) >= SNIFFED // 4 else lines  # the last one may be cut
    return max(DELIMITERS, key=lambda delimiter: _alike(lines, delimiter)), 0


def _alike(lines: list[str], delimiter: str) -> tuple[float, int]:
    """(share of the first records with as many cells as the first one, that number); (0, 1) where it parts nothing."""
    widths: list[int] = []
    try:
        widths += (len(cells) for _, cells in islice(records(lines, delimiter), 50) if cells)
    except Unreadable:
        pass
    if not widths or widths[0] == 1:
        return 0.0, 1
    return widths.count(widths[0]) / len(widths), widths[0]
