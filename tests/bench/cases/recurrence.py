"""The gated delta rule in chunks against mlx_lm's loop: one mixer of Qwen3.5-0.8B's shape, forward and backward.

`added_bytes` are those that a step needs beyond the weights, which are the same on every side.
"""

from __future__ import annotations

from typing import Any

from tests.bench.inputs import Inputs
from tests.bench.process import Failed, Side, alternate

LENGTHS = (128, 512)
SAME = 1e-4


def measure(inputs: Inputs, quick: bool) -> dict[str, Any]:
    """Figures by length and side."""
    found = {}
    for length in LENGTHS[:1] if quick else LENGTHS:
        print(f" {length} positions", flush=True)
        sides: dict[str, Side] = {
            "mlx_lm": ("mixer.theirs", {"length": length, "steps": 3}),
            "our rule": ("mixer.rule", {"length": length, "steps": 5}),
            "as trained here": ("mixer.ours", {"length": length, "steps": 5}),
        }
        found[str(length)] = with_ratios(alternate(sides, runs=1 if quick else 3))
    return found


def with_ratios(found: dict[str, Any]) -> dict[str, Any]:
    """Add to our sides how much faster they are and how much less they add; Failed where results differ."""
    theirs, *ours = found.values()
    for side in ours:
        if any(abs(a / b - 1) > SAME for a, b in zip(side["result"], theirs["result"], strict=True)):
            raise Failed(f"norms of output and gradient: ours {side['result']}, theirs {theirs['result']}")
        side["speedup"] = theirs["seconds"] / side["seconds"]
        side["less_added"] = theirs["added_bytes"] / side["added_bytes"]
        side["less_peak"] = theirs["peak_bytes"] / side["peak_bytes"]
    return found


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    rows = [
        [length if side == "mlx_lm" else "", side, run["seconds"], run.get("speedup"), run["added_bytes"] / 1e6,
         run.get("less_added"), run["peak_bytes"] / 1e6, run.get("less_peak")]
        for length, sides in figures.items()
        for side, run in sides.items()
    ]  # fmt: skip
    title = "A gated delta mixer of Qwen3.5-0.8B's shape in float32, forward and backward, one row."
    header = ["positions", "", "s", "times faster", "MB added", "times less", "peak MB", "times less"]
    return [(title, header, rows)]
