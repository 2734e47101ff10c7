"""One optimizer step against PEFT on torch's CPU backend: float32, completion loss, the memory of whole processes.

A run of several epochs keeps what enters its first adapted layer, so that its steps are those of "prefix kept" from
the second epoch on; in the first they are those of "ours".
"""

from __future__ import annotations

from typing import Any

from tests.bench.cases.mlx_lm import with_ratios
from tests.bench.inputs import Inputs
from tests.bench.process import Side, alternate


def measure(inputs: Inputs, quick: bool) -> dict[str, Any]:
    """Both sides on the same float16 files, computed in float32."""
    common = {"model": inputs.float16, "rows": inputs.rows("completion"), "steps": 2 if quick else 4}
    sides: dict[str, Side] = {
        "peft": ("torch_peft", common),
        "ours": ("ours", {**common, "optimizer": "adamw"}),
        "ours, prefix kept": ("ours", {**common, "optimizer": "adamw", "cache_prefix": "on"}),
        "ours, checkpointing": ("ours", {**common, "optimizer": "adamw", "grad_checkpoint": "on"}),
    }
    return with_ratios(alternate(sides, runs=1 if quick else 3), "peft")


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    rows = [
        [side, run["seconds"], run.get("speedup"), run["process_bytes"] / 1e9, run.get("process_share")]
        for side, run in figures.items()
    ]
    title = "The same step in float32 with completion loss, against PEFT on torch (two threads)."
    return [(title, ["", "s/step", "times faster", "process GB", "of PEFT's"], rows)]
