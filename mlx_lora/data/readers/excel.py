""".xlsx: the first sheet that isn't empty, its first row naming the columns; formulas as the values last computed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from mlx_lora.config import Data
from mlx_lora.data.readers.base import Note, Raw, Unreadable, cell, library
from mlx_lora.data.readers.table import table


def rows(file: Path, settings: Data, note: Note) -> Iterator[Raw]:
    with closing(_opened(file)) as book:
        sheets = [sheet for sheet in book.worksheets if next(_records(sheet), None)]
        if len(sheets) > 1:
            others = ", ".join(sheet.title for sheet in sheets[1:])
            note(f"sheet {sheets[0].title} is read, not {others}")
        for sheet in sheets[:1]:
            yield from table(_records(sheet))


def _opened(file: Path) -> Any:
    excel = library("openpyxl")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about styles and extensions, which are not read
            return excel.load_workbook(file, read_only=True, data_only=True)
    except Exception as error:  # the library lets zip's and XML's errors through
        raise Unreadable(f"is damaged, or not an .xlsx file ({type(error).__name__})") from None


def _records(sheet: Any) -> Iterator[tuple[int, list[str]]]:
    """(row number, cells) of each row that has any."""
    sheet.reset_dimensions()  # some programs write a wrong size
    found = enumerate(sheet.iter_rows(values_only=True), start=1)
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                number, values = next(found, (0, ()))
        except Exception as error:
            raise Unreadable(f"is damaged ({type(error).__name__})") from None
        if not number:
            return
        if any(value is not None for value in values):
            yield number, [cell(value) for value in values]
