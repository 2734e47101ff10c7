""".parquet, in batches of rows. A row's line is its number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_lora.config import Data
from mlx_lora.data.readers.base import Note, Raw, Unreadable, cell, library

BATCH = 256


def rows(file: Path, settings: Data, note: Note) -> Iterator[Raw]:
    number = 0
    for batch in _batches(file):
        for row in batch:
            number += 1
            yield Raw(number, {name: cell(value) for name, value in row.items()})


def _batches(file: Path) -> Iterator[list[dict[str, Any]]]:
    parquet = library("pyarrow.parquet")
    try:
        with parquet.ParquetFile(file, pre_buffer=False) as opened:
            for batch in opened.iter_batches(BATCH, use_threads=False):
                yield batch.to_pylist()
    except Exception as error:  # pyarrow's own, and OSError for what is cut or damaged
        raise Unreadable(f"is damaged, or not a .parquet file ({type(error).__name__})") from None
