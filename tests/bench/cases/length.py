"""Time and peak memory by sequence length: SmolLM2-135M, one random row, loss on its last quarter.

mlx_lm is measured in float32 only: its 4-bit step at 2048 positions would take many minutes on a CPU backend.
"""

from __future__ import annotations

from typing import Any

from tests.bench.inputs import Inputs
from tests.bench.process import Side, alternate

LENGTHS = (128, 512, 2048)
BASES: dict[str, int | None] = {"float32": None, "4-bit": 4}
SUFFIX = {"off": "", "on": ", checkpointing"}


def measure(inputs: Inputs, quick: bool) -> dict[str, Any]:
    """Figures by base, length and side."""
    bases: dict[str, Any] = {}
    for base, bits in BASES.items():
        bases[base] = {}
        for length in (128, 512) if quick else LENGTHS:
            print(f" {base}, {length} positions", flush=True)
            options = {"model": inputs.model(bits), "length": length, "steps": 3 if length < 512 else 1}
            runs = 1 if quick or length >= 512 else 2
            bases[base][str(length)] = alternate(_sides(options, peer=bits is None), runs=runs)
    return {"bases": bases}


def _sides(options: dict[str, Any], *, peer: bool) -> dict[str, Side]:
    tools = {"mlx_lm": "theirs.length", "ours": "ours.length"} if peer else {"ours": "ours.length"}
    return {
        f"{tool}{suffix}": (side, {**options, "grad_checkpoint": checkpoint})
        for tool, side in tools.items()
        for checkpoint, suffix in SUFFIX.items()
    }


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    """One table a base, a row a length, seconds and peak of every side."""
    drawn = []
    for base, lengths in figures["bases"].items():
        labels = list(next(iter(lengths.values())))
        rows = [
            [
                length,
                *(
                    f"{_short(sides[label]['seconds'])} s, {sides[label]['peak_bytes'] / 1e9:.2f} GB"
                    for label in labels
                ),
            ]
            for length, sides in lengths.items()
        ]
        drawn.append((f"A step on one row, {base} base: time and peak memory.", ["positions", *labels], rows))
    return drawn


def _short(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds >= 10 else f"{seconds:.2f}"
