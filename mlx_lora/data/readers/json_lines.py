""".jsonl, .ndjson: a JSON object a line. A file that holds one list all the same is read as one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from mlx_lora.config import Data
from mlx_lora.data.readers import decode, json_file
from mlx_lora.data.readers.base import Note, Raw
from mlx_lora.data.readers.json_values import reason


def rows(file: Path, settings: Data, note: Note) -> Iterator[Raw]:
    if decode.head(file).lstrip("\ufeff \t\r\n").startswith("["):
        note("holds one JSON list, not a row a line")
        yield from json_file.rows(file, settings, note)
        return
    for number, line in decode.lines(file, note):
        if line.isspace():
            continue
        try:
            yield json_file.row(number, json.loads(line))
        except (ValueError, RecursionError) as error:
            yield Raw(number, None, f"not valid JSON ({reason(error)})")
