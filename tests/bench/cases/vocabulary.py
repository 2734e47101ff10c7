"""Peak memory by vocabulary size: Gemma 3's shape in small, random float32 weights, four rows of 512, loss on all."""

from __future__ import annotations

from typing import Any

from tests.bench.cases.mlx_lm import with_ratios
from tests.bench.inputs import Inputs
from tests.bench.process import Side, alternate

SIZES = (32768, 262144)


def measure(inputs: Inputs, quick: bool) -> dict[str, Any]:
    """Figures by vocabulary size."""
    found = {}
    for size in SIZES[:1] if quick else SIZES:
        print(f" {size} words", flush=True)
        options = {"vocabulary": size, "steps": 1}
        sides: dict[str, Side] = {"mlx_lm": ("theirs.vocabulary", options), "ours": ("ours.vocabulary", options)}
        found[str(size)] = with_ratios(alternate(sides, runs=1), "mlx_lm")
    return found


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    rows = [
        [f"{int(size):,}", *(sides[side]["peak_bytes"] / 1e9 for side in ("mlx_lm", "ours")),
         sides["ours"]["peak_share"], *(sides[side]["seconds"] for side in ("mlx_lm", "ours"))]
        for size, sides in figures.items()
    ]  # fmt: skip
    title = "Peak memory by vocabulary: hidden 640, 4 layers, float32, four rows of 512 positions, loss on every token."
    return [(title, ["vocabulary", "mlx_lm GB", "ours GB", "share", "mlx_lm s/step", "ours s/step"], rows)]
