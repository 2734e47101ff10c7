"""One optimizer step against mlx_lm's trainer: SmolLM2-135M, four WikiSQL rows of 96 positions, Adam, compiled.

Both adapt every linear of the last 16 layers with rank 8. mlx_lm's 4-bit step takes most of a minute on a CPU backend,
which is why it is measured only a few times, and with one mask.
"""

from __future__ import annotations

from typing import Any

from tests.bench.inputs import Inputs
from tests.bench.process import Failed, Side, alternate

# Two sides start alike: the loss before any update differs by rounding only.
SAME_LOSS = 1e-3
BASES: dict[str, int | None] = {"4-bit": 4, "float32": None}
MASKS = ("completion", "all")


def measure(inputs: Inputs, quick: bool) -> dict[str, Any]:
    """Figures by base and mask."""
    found: dict[str, Any] = {}
    for base, bits in BASES.items():
        for mask in MASKS[:1] if quick or bits else MASKS:
            # in both tools, the step before the measured ones compiles
            theirs, ours, runs = (2, 3, 2) if bits else (3, 3, 3)
            if quick:
                theirs, ours, runs = 1, 2, 1
            print(f" {base}, loss on {mask}", flush=True)
            found[f"{base}, {mask}"] = compare(inputs.model(bits), inputs.rows(mask), theirs, ours, runs)
    return found


def compare(model: str, rows: str, their_steps: int, our_steps: int, runs: int) -> dict[str, Any]:
    """All sides on one model and mask, with mlx_lm's figures as the ones to beat."""
    common = {"model": model, "rows": rows}
    sides: dict[str, Side] = {
        "mlx_lm": ("theirs", {**common, "steps": their_steps}),
        "ours": ("ours", {**common, "steps": our_steps}),
        "ours, checkpointing": ("ours", {**common, "steps": our_steps, "grad_checkpoint": "on"}),
    }
    found = alternate(sides, runs=runs)
    return with_ratios(found, "mlx_lm")


def with_ratios(found: dict[str, Any], peer: str) -> dict[str, Any]:
    """Add to each of our sides how much faster it is than `peer`, and its share of the peer's peak."""
    theirs = found[peer]
    for label, ours in found.items():
        if label == peer:
            continue
        check_same_work(ours, theirs)
        ours["speedup"] = theirs["seconds"] / ours["seconds"]
        for key in ("peak_bytes", "process_bytes"):
            if key in ours and key in theirs:
                ours[key.replace("bytes", "share")] = ours[key] / theirs[key]
    return found


def check_same_work(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raise Failed unless both trained as many parameters on as many tokens from the same loss."""
    for key in ("trainable_parameters", "trained_tokens"):
        if ours[key] != theirs[key]:
            raise Failed(f"{key}: ours {ours[key]}, theirs {theirs[key]}")
    first = ours["losses"][0], theirs["losses"][0]
    if abs(first[0] / first[1] - 1) > SAME_LOSS:
        raise Failed(f"the loss before any update: ours {first[0]}, theirs {first[1]}")


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    """One table: a row for each base, mask and side."""
    rows = [
        [case if side == "mlx_lm" else "", side, run["seconds"], run.get("speedup"), run["peak_bytes"] / 1e9,
         run.get("peak_share")]
        for case, sides in figures.items()
        for side, run in sides.items()
    ]  # fmt: skip
    title = "A training step on SmolLM2-135M: four WikiSQL rows of 96 positions, rank 8 in 16 layers."
    return [(title, ["base, loss on", "", "s/step", "times faster", "peak GB", "of mlx_lm's"], rows)]
