"""Swapping adapters in a chat on SmolLM2-135M: sixteen LoRAs of rank 16 on all linears, and a DoRA that runs alone.

Beside it mlx_lm.server, which loads its model again for another adapter. A processor, one sitting, in turn.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from tests.bench.inputs import Inputs
from tests.bench.process import side


def measure(inputs: Inputs, quick: bool) -> dict[str, Any]:
    """Figures of ours and of the server's, and how many times longer its swap takes."""
    model, runs = inputs.model(None), 1 if quick else 3
    ours, theirs = [], []
    for _ in range(runs):
        ours.append(side("swapping", model=model))
        print(f"  ours: {ours[-1]}", flush=True)
        theirs.append(side("swapping_server", model=model))
        print(f"  mlx_lm.server: {theirs[-1]}", flush=True)
    found = {"ours": _medians(ours), "mlx_lm.server": _medians(theirs)}
    times = found["mlx_lm.server"]["swap_ms"] / found["ours"]["swap_ms"]
    first = found["mlx_lm.server"]["first_token_ms"]["swapped"] / found["ours"]["first_token_ms"]["swapped"]
    return found | {"swap_times": times, "first_token_times": first}


def _medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of every figure."""
    return {
        key: _medians([run[key] for run in runs]) if isinstance(value, dict) else median(run[key] for run in runs)
        for key, value in runs[0].items()
    }


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    ours, theirs = figures["ours"], figures["mlx_lm.server"]
    title = (
        f"Milliseconds of a swap between {ours['adapters']} adapters on SmolLM2-135M, medians. "
        f"mlx_lm.server's swap takes {figures['swap_times']:,.0f} times as long; its first token after one, "
        f"{figures['first_token_times']:.0f} times."
    )
    first = ours["first_token_ms"]
    rows = [
        ["chat, adapters that join", ours["joined_ms"], first["swapped"], first["same"]],
        ["chat, one that runs alone", ours["alone_ms"], first["alone"], None],
        ["chat, an adapter's first use", ours["first_use_ms"], None, None],
        ["mlx_lm.server", theirs["swap_ms"], theirs["first_token_ms"]["swapped"], theirs["first_token_ms"]["same"]],
    ]
    return [(title, ["", "swap", "first token after a swap", "without a swap"], rows)]
