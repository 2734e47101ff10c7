"""Tokens a second of `generate` on SmolLM2-135M, from half precision and from 4 bits, beside mlx_lm's in turn.

mlx_lm is measured as it is, and cast to float32, which is its best on a processor: halves are emulated there. On a GPU
both tools multiply by the stored weights, and this says nothing.
"""

from __future__ import annotations

from typing import Any

from tests.bench.inputs import Inputs
from tests.bench.process import Failed, Side, alternate

BASES: dict[str, int | None] = {"half precision": None, "4-bit": 4}
# Rounding may decide between two tokens at some point: so many must be the same.
SAME_TOKENS = 8
# Of mlx_lm in emulated halves, once: a token takes seconds, and the prompt minutes.
STORED_TOKENS = 4


def measure(inputs: Inputs, quick: bool) -> dict[str, Any]:
    """Figures by base and side; `tokens_per_second` is of the median token after the first."""
    found: dict[str, Any] = {}
    for base, bits in BASES.items():
        print(f" {base}", flush=True)
        common = {"model": inputs.model(bits), "count": 12 if quick else 32}
        stored: dict[str, Side] = {"mlx_lm": ("generation.theirs", {**common, "count": STORED_TOKENS})}
        sides: dict[str, Side] = {
            "mlx_lm, float32": ("generation.theirs", {**common, "float32": True}),
            "ours": ("generation.ours", common),
        }
        found[base] = alternate(stored, runs=1) | alternate(sides, runs=1 if quick else 3)
        first = {label: run.pop("tokens")[:SAME_TOKENS] for label, run in found[base].items()}
        if first["ours"] != first["mlx_lm, float32"]:
            raise Failed(f"{base}: other tokens, ours {first['ours']}, theirs {first['mlx_lm, float32']}")
        best = min(run["seconds"] for label, run in found[base].items() if label != "ours")
        for run in found[base].values():
            run["tokens_per_second"] = 1 / run["seconds"]
        found[base]["ours"]["speedup"] = best / found[base]["ours"]["seconds"]
    return found


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    rows = [
        [f"{base}, {side}", run["tokens_per_second"], run.get("speedup"), run["peak_bytes"] / 1e9]
        for base, sides in figures.items()
        for side, run in sides.items()
    ]
    title = "Generating with SmolLM2-135M on a processor: greedy, behind a prompt of 51 tokens, one answer at a time."
    return [(title, ["base, side", "tokens/s", "times mlx_lm's best", "peak GB"], rows)]
