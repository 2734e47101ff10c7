"""The gated delta rule in chunks against mlx_lm's loop: one mixer of Qwen3.5-0.8B's shape, and the whole model.

`added_bytes` are those that a step needs beyond the weights, which are the same on every side. The whole model is ours
alone: mlx_lm's loop would keep tens of gigabytes.
"""

from __future__ import annotations

from typing import Any

from tests.bench.inputs import Inputs
from tests.bench.process import Failed, Side, alternate, line, side

LENGTHS = (128, 512)
# Positions and gradient checkpointing of the whole model.
RUNS = ((1024, "on"), (2048, "on"), (2048, "off"))
SAME = 1e-4
HEADER = ["positions", "", "s", "times faster", "MB added", "times less", "peak MB", "times less"]


def measure(inputs: Inputs, quick: bool) -> dict[str, Any]:
    """Figures of the mixer by length and side, and of the whole model by length and checkpointing."""
    found: dict[str, Any] = {}
    rule: dict[str, Any] = {}
    for length in LENGTHS[:1] if quick else LENGTHS:
        print(f" {length} positions", flush=True)
        sides: dict[str, Side] = {
            "mlx_lm": ("mixer.theirs", {"length": length, "steps": 3}),
            "our rule": ("mixer.rule", {"length": length, "steps": 5}),
            "as trained here": ("mixer.ours", {"length": length, "steps": 5}),
        }
        found[str(length)] = with_ratios(alternate(sides, runs=1 if quick else 3))
        of_rule: dict[str, Side] = {
            "mlx_lm": ("mixer.loop", {"length": length, "steps": 3}),
            "ours": ("mixer.chunks", {"length": length, "steps": 5}),
        }
        rule[str(length)] = with_ratios(alternate(of_rule, runs=1 if quick else 3))
    return {"rule": rule, "mixer": found, "model": whole_model(quick)}


def whole_model(quick: bool) -> list[dict[str, Any]]:
    """Steps of Qwen3.5-0.8B's shape, of four of its layers in a quick run."""
    runs = []
    for length, checkpoint in RUNS[:1] if quick else RUNS:
        options = {"length": length, "checkpoint": checkpoint, "layers": 4 if quick else 24, "steps": 1}
        runs.append({**options, **side("ours_hybrid.run", **options)})
        print(f"  {length} positions, checkpointing {checkpoint}: {line(runs[-1])}", flush=True)
    return runs


def with_ratios(found: dict[str, Any]) -> dict[str, Any]:
    """Add to our sides how much faster they are and how much less they add; Failed where results differ."""
    theirs, *ours = found.values()
    for our in ours:
        if any(abs(a / b - 1) > SAME for a, b in zip(our["result"], theirs["result"], strict=True)):
            raise Failed(f"norms of output and gradient: ours {our['result']}, theirs {theirs['result']}")
        our["speedup"] = theirs["seconds"] / our["seconds"]
        our["less_added"] = theirs["added_bytes"] / our["added_bytes"]
        our["less_peak"] = theirs["peak_bytes"] / our["peak_bytes"]
    return found


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    shape = "of Qwen3.5-0.8B's shape in float32, forward and backward, one row."
    runs = figures["model"]
    whole = [
        [str(run["length"]), run["checkpoint"], run["seconds"][0], run["peak_bytes"] / 1e9, run["base_bytes"] / 1e9]
        for run in runs
    ]
    of_model = f"Steps of Qwen3.5-0.8B's shape, {runs[0]['layers']} layers at 4 bits, 8,192 words, the default adapter."
    return [
        (f"The gated delta rule by itself, {shape}", HEADER, _compared(figures["rule"])),
        (f"A whole gated delta mixer {shape}", HEADER, _compared(figures["mixer"])),
        (of_model, ["positions", "checkpointing", "s/step", "peak GB", "of it the model"], whole),
    ]


def _compared(lengths: dict[str, Any]) -> list[list[Any]]:
    return [
        [length if side == "mlx_lm" else "", side, run["seconds"], run.get("speedup"), run["added_bytes"] / 1e6,
         run.get("less_added"), run["peak_bytes"] / 1e6, run.get("less_peak")]
        for length, sides in lengths.items()
        for side, run in sides.items()
    ]  # fmt: skip
