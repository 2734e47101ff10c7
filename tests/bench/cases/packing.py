"""Several rows in one line against a row a line: epochs of 100 WikiSQL rows, completion loss, SmolLM2-135M."""

from __future__ import annotations

from typing import Any

from tests.bench.inputs import Inputs
from tests.bench.process import Side, alternate

BASES: dict[str, int | None] = {"float32": None}
SIDES = {"alone": False, "packed": True}


def measure(inputs: Inputs, quick: bool) -> dict[str, Any]:
    """Figures by base and side; `seconds` are of the epochs after the first, which compiles."""
    found: dict[str, Any] = {}
    for base, bits in list(BASES.items())[: 1 if quick else None]:
        print(f" {base}", flush=True)
        common = {"model": inputs.model(bits), "data": inputs.wikisql, "layers": 16, "epochs": 2}
        common["count"] = 40 if quick else 100
        sides: dict[str, Side] = {
            label: ("ours_epochs", {**common, "packing": packing}) for label, packing in SIDES.items()
        }
        found[base] = alternate(sides, runs=1 if quick else 2)
        for run in found[base].values():
            run["seconds_per_trained_token"] = run["seconds"] / run["trained_tokens"]
        found[base]["packed"]["speedup"] = found[base]["alone"]["seconds"] / found[base]["packed"]["seconds"]
    return found


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    rows = [
        [f"{base}, {side}", run["seconds"], run["seconds_per_trained_token"] * 1000, run.get("speedup"),
         f"{run['padding_fraction']:.1%}", run["peak_bytes"] / 1e9]
        for base, sides in figures.items()
        for side, run in sides.items()
    ]  # fmt: skip
    header = ["base, rows", "epoch s", "ms per trained token", "times faster", "padding", "peak GB"]
    count = next(iter(figures.values()))["packed"]["rows"]
    return [(f"{count} rows of WikiSQL alone in a line, grouped by length, and packed.", header, rows)]
