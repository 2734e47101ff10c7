"""One training step on a model of LLaMA-7B's shape: random 4-bit weights, rank 8 on attention in every layer.

`python -m tests.bench shape_7b --quick` does it with two of the 32 layers.
"""

from __future__ import annotations

from typing import Any

from tests.bench.inputs import Inputs
from tests.bench.process import line, side

LENGTHS = (128, 512)


def measure(inputs: Inputs, quick: bool) -> dict[str, Any]:
    """Figures by sequence length; the only step measured is the first, which is what peaks."""
    found = {}
    for length in LENGTHS:
        found[str(length)] = side("ours_7b", length=length, layers=2 if quick else 32)
        print(f"  {length} positions: {line(found[str(length)])}", flush=True)
    return found


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    layers = next(iter(figures.values()))["layers"]
    rows = [
        [length, run["seconds"][0], run["peak_bytes"] / 1e9, run["base_bytes"] / 1e9, run["process_bytes"] / 1e9]
        for length, run in figures.items()
    ]
    title = f"One step on LLaMA-7B's shape, {layers} layers at 4 bits, gradient checkpointing."
    return [(title, ["positions", "s/step", "peak GB", "of it the model", "process GB"], rows)]
