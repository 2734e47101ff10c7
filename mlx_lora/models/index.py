"""Compare a model's index with its weight files, and name tensors that are missing.

The files decide, not the index: several public conversions include the index of their source model, which names shards
that the conversion doesn't have. Reads only headers of safetensors files, and works for any architecture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_lora import files
from mlx_lora.errors import ModelError

INDEX = "model.safetensors.index.json"
# MLX's message for weights that don't fit a model: their number, then their names, one a line.
_MISMATCH = re.compile(r"(Missing|Received) (\d+) parameters(?: not in model)?: \n(.+)")


def disagreement(path: Path, weights: list[Path]) -> str | None:
    """How the index of a model directory differs from its files, or None if it doesn't differ or there is no index."""
    file = path / INDEX
    if not file.exists():
        return None
    try:
        indexed = _weight_map(file)
    except ModelError:
        return f"{file} can't be read"
    actual = {tensor.name: file.name for file in weights for tensor in files.tensors(file, ModelError)}
    if absent := _absent(path, indexed):
        return f"{file} names {_abbreviated(absent)}, not here"
    if wrong := sorted(name for name in {*indexed, *actual} if indexed.get(name) != actual.get(name)):
        return f"{file} doesn't agree with the files about {_abbreviated(wrong)}"
    return None


@contextmanager
def naming_tensors(path: Path) -> Iterator[None]:
    """Turn errors of MLX and mlx_lm about weights that don't fit the model into a ModelError that names the tensor."""
    try:
        yield
    except KeyError as error:
        name = str(error.args[0]) if error.args else ""
        if "." not in name:  # a key of config.json
            raise
        raise ModelError(f"{path}: {name} is missing, no file has it", hint=_hint(path)) from error
    except ValueError as error:
        if (match := _MISMATCH.match(str(error))) is None:
            raise
        kind, count, name = match[1], int(match[2]), match[3].rstrip(",.")
        more = f", and so {'is' if count == 2 else 'are'} {count - 1} more" if count > 1 else ""
        if kind == "Missing":
            raise ModelError(f"{path}: {name} is missing, no file has it{more}", hint=_hint(path)) from error
        more = f", and {count - 1} more" if count > 1 else ""
        raise ModelError(f"{path}: its files hold {name}{more}, which the model doesn't have") from error


def _hint(path: Path) -> str | None:
    """A hint that names files which are in the index but not in the directory: a missing tensor may be in them."""
    try:
        absent = _absent(path, _weight_map(path / INDEX))
    except ModelError:
        return None
    return f"{INDEX} names {_abbreviated(absent)}, not here: fetch what is missing" if absent else None


def _weight_map(file: Path) -> dict[str, str]:
    value: Any = files.read_json(file, ModelError)
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict):
        raise ModelError(f"{file}: has no weight_map")
    return {str(tensor): str(shard) for tensor, shard in weight_map.items()}


def _absent(path: Path, weight_map: dict[str, str]) -> list[str]:
    """Files that the index names but the directory itself doesn't contain."""
    present = {file.name for file in path.iterdir()}
    return sorted(set(weight_map.values()) - present)


def _abbreviated(names: list[str]) -> str:
    return names[0][:200] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
