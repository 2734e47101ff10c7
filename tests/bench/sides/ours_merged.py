"""Our side of `merged`: whether fusing left the packed weights as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def run(before: str, after: str) -> dict[str, Any]:
    """Compare every packed weight of two model directories, byte by byte."""
    import mlx.core as mx

    def packed(folder: str) -> dict[str, mx.array]:
        found: dict[str, mx.array] = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            arrays: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
            found |= {name: array for name, array in arrays.items() if array.dtype == mx.uint32}
        return found

    first, second = packed(before), packed(after)
    same = all(name in second and mx.array_equal(array, second[name]).item() for name, array in first.items())
    return {"alike": bool(same and first)}
