"""Keeping the states below the lowest adapted layer: adapters in the last 4 of SmolLM2's 30 layers, 200 WikiSQL rows.

Completion loss, the same rows in the same order with and without; the first epoch computes what later ones read.
"""

from __future__ import annotations

from typing import Any

from tests.bench.inputs import Inputs
from tests.bench.process import Side, alternate

BASES: dict[str, int | None] = {"float32": None}
SIDES = {"computed": "off", "kept": "on"}


def measure(inputs: Inputs, quick: bool) -> dict[str, Any]:
    """Figures by base and side; `seconds` are of the epochs after the first."""
    found: dict[str, Any] = {}
    for base, bits in list(BASES.items())[: 1 if quick else None]:
        print(f" {base}", flush=True)
        common = {"model": inputs.model(bits), "data": inputs.wikisql, "layers": 4, "count": 40 if quick else 200}
        sides: dict[str, Side] = {
            label: ("ours_epochs", {**common, "epochs": 3, "cache_prefix": cache}) for label, cache in SIDES.items()
        }
        found[base] = alternate(sides, runs=1 if quick else 2)
        computed, kept = found[base]["computed"], found[base]["kept"]
        kept["speedup"] = computed["seconds"] / kept["seconds"]
        kept["loss_difference"] = max(abs(a - b) for a, b in zip(computed["losses"], kept["losses"], strict=True))
    return found


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    rows = [
        [f"{base}, {side}", run["seconds"], run.get("speedup"), run["peak_bytes"] / 1e9,
         f"{run['losses'][-1]:.4f}"]
        for base, sides in figures.items()
        for side, run in sides.items()
    ]  # fmt: skip
    count = next(iter(figures.values()))["kept"]["rows"]
    title = f"Adapters in the last 4 of 30 layers, {count} WikiSQL rows: hidden states below computed anew or kept."
    return [(title, ["base, states", "epoch s", "times faster", "peak GB", "last loss"], rows)]
