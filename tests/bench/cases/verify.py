"""What the comparison of a model's parts with the model costs at the start of a run: SmolLM2's 30 layers."""

from __future__ import annotations

from statistics import median
from typing import Any

from tests.bench.inputs import Inputs
from tests.bench.process import side


def measure(inputs: Inputs, quick: bool) -> dict[str, Any]:
    """Median seconds of each part, for a base in float32 and at 4 bits."""
    found = {}
    for bits in (None, 4):
        run = side("ours_verify.run", model=inputs.model(bits), steps=2 if quick else 7)
        parts = ("take_apart", "seconds", "packing")
        found["float32" if bits is None else "4-bit"] = {**run, **{part: median(run[part]) for part in parts}}
    return found


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    rows = [[base, run["take_apart"], run["seconds"], run["packing"]] for base, run in figures.items()]
    layers = next(iter(figures.values()))["layers"]
    title = f"Seconds at the start of a run on SmolLM2's {layers} layers, adapted by the defaults."
    return [(title, ["base", "trunk and head", "lean, computed again, last layer", "packing, where asked for"], rows)]
