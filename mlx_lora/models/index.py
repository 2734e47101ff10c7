"""What the files of a model hold counts, not what its index says: where the two differ, and which tensor is missing.

Several public conversions carry the index of the model they were made from, which names shards that were never there.
Knows headers of safetensors files, and not one architecture.
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
# What MLX says of weights that don't fit a model: how many, and then their names, one a line.
_UNFITTING = re.compile(r"(Missing|Received) (\d+) parameters(?: not in model)?: \n(.+)")


def disagreement(path: Path, weights: list[Path]) -> str | None:
    """How the index of a model directory differs from its files, or None where it doesn't, or isn't there."""
    file = path / INDEX
    if not file.exists():
        return None
    try:
        promised = _weight_map(file)
    except ModelError:
        return f"{file} can't be read"
    held = {tensor.name: file.name for file in weights for tensor in files.tensors(file, ModelError)}
    if absent := _absent(path, promised):
        return f"{file} names {_some(absent)}, not here"
    if wrong := sorted(name for name in {*promised, *held} if promised.get(name) != held.get(name)):
        return f"{file} doesn't agree with the files about {_some(wrong)}"
    return None


@contextmanager
def naming_tensors(path: Path) -> Iterator[None]:
    """Turn what MLX and mlx_lm raise over weights that don't fit the model into a ModelError naming the tensor."""
    try:
        yield
    except KeyError as error:
        name = str(error.args[0]) if error.args else ""
        if "." not in name:  # a key of config.json
            raise
        raise ModelError(f"{path}: {name} is missing, no file has it", hint=_hint(path)) from error
    except ValueError as error:
        if (found := _UNFITTING.match(str(error))) is None:
            raise
        what, count, name = found[1], int(found[2]), found[3].rstrip(",.")
        more = f", and so {'is' if count == 2 else 'are'} {count - 1} more" if count > 1 else ""
        if what == "Missing":
            raise ModelError(f"{path}: {name} is missing, no file has it{more}", hint=_hint(path)) from error
        more = f", and {count - 1} more" if count > 1 else ""
        raise ModelError(f"{path}: its files hold {name}{more}, which the model doesn't have") from error


def _hint(path: Path) -> str | None:
    """Files that the index names and that aren't there, as where a missing tensor may be."""
    try:
        absent = _absent(path, _weight_map(path / INDEX))
    except ModelError:
        return None
    return f"{INDEX} names {_some(absent)}, not here: fetch what is missing" if absent else None


def _weight_map(file: Path) -> dict[str, str]:
    value: Any = files.read_json(file, ModelError)
    promised = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(promised, dict):
        raise ModelError(f"{file}: has no weight_map")
    return {str(name): str(where) for name, where in promised.items()}


def _absent(path: Path, promised: dict[str, str]) -> list[str]:
    """Files that an index names and the directory doesn't hold; none are looked for elsewhere."""
    here = {file.name for file in path.iterdir()}
    return sorted(set(promised.values()) - here)


def _some(names: list[str]) -> str:
    return names[0][:200] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
