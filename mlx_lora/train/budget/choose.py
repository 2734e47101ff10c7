"""How a run is to be run within a limit of memory: gradient checkpointing, and how large micro-batches may be.

    rows as they are, layers kept   ->   smaller micro-batches   ->   layers computed again   ->   one row at a time

The gradient is the same in every case: what differs is time. A row is never cut, so where one alone is too long for
the limit the plan doesn't fit, and only another recipe would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlx_lora.config import Train
from mlx_lora.data.batch import MOST_POSITIONS, PACKED_POSITIONS, padded
from mlx_lora.train.budget.costs import Costs
from mlx_lora.train.budget.predict import Micro, Parts, predict

# Micro-batches are made smaller down to this before layers are computed again: with fewer positions a processor waits.
GOOD_POSITIONS = 512


@dataclass(frozen=True)
class Shown:
    """What earlier runs have shown: `correction` multiplies all but weights, adapter and optimizer state; `seconds`
    are those of a multiplication, None where none was timed."""

    correction: float = 1.0
    seconds: float | None = None


@dataclass(frozen=True)
class Lengths:
    """Tokens of each row, and the most of a row's that carry loss."""

    tokens: Sequence[int]
    trained: int


@dataclass(frozen=True)
class Plan:
    """What a run will hold at its peak, beside what it may, and how it has to be run for that.

    `recompute` is gradient checkpointing; micro-batches hold at most `most_positions`, or a single line, and `micro` is
    the largest of them. `fixed` are the bytes that no choice changes, `work` the multiplications of a position, `pace`
    the seconds of one where they are known, and `kind` tells runs apart that don't correct each other.
    """

    parts: Parts
    limit_bytes: int
    micro: Micro
    recompute: bool
    most_positions: int
    kind: str
    fixed: int
    work: int
    correction: float
    pace: float | None = None
    seconds: float | None = None
    suggestion: list[str] | None = None

    @property
    def peak_memory_bytes(self) -> int:
        return self.parts.total

    @property
    def fits(self) -> bool:
        return self.peak_memory_bytes <= self.limit_bytes

    def as_dict(self) -> dict[str, Any]:
        """The keys of `plan --json`."""
        return {
            "fits": self.fits,
            "peak_memory_bytes": self.peak_memory_bytes,
            "parts": asdict(self.parts),
            "limit_bytes": self.limit_bytes,
            "suggestion": self.suggestion,
            "seconds": self.seconds,
            "grad_checkpoint": "on" if self.recompute else "off",
            "most_positions": self.most_positions,
            "micro_batch": asdict(self.micro),
        }


def plan(
    costs: Costs,
    rows: Lengths,
    settings: Train,
    limit: int,
    *,
    packing: bool = False,
    shown: Callable[[str], Shown] = lambda kind: Shown(),
) -> Plan:
    """The fastest way to run `settings` on `rows` within `limit` bytes, or the smallest where none fits."""
    choices = {"auto": (False, True), "on": (True,), "off": (False,)}[settings.grad_checkpoint]
    widths = _widths(rows, settings, packing)
    sizes = [MOST_POSITIONS]
    while sizes[-1] > max(widths):
        sizes.append(max(sizes[-1] // 2, max(widths)))
    good = [size for size in sizes if size >= GOOD_POSITIONS] or sizes[-1:]
    for recompute, most in [(recompute, most) for some in (good, sizes) for recompute in choices for most in some]:
        micro = largest(widths, rows.trained, settings.batch_size, most)
        made = _plan(costs, micro, limit, recompute=recompute, most=most, shown=shown)
        if made.fits:
            break
    return made


def _plan(costs: Costs, micro: Micro, limit: int, *, recompute: bool, most: int, shown: Callable[[str], Shown]) -> Plan:
    device = "gpu" if costs.gpu else "cpu"
    kind = f"{device}, {costs.bits or 8 * costs.size} bits, layers {'computed again' if recompute else 'kept'}"
    before = shown(kind)
    return Plan(
        parts=predict(costs, micro, recompute=recompute, correction=before.correction),
        limit_bytes=limit,
        micro=micro,
        recompute=recompute,
        most_positions=most,
        kind=kind,
        fixed=costs.fixed,
        work=costs.work(recompute=recompute),
        correction=before.correction,
        pace=before.seconds,
    )


def largest(widths: Sequence[int], trained: int, batch_size: int, most: int) -> Micro:
    """The micro-batch with most positions that rows of these padded widths can make, whatever their order."""
    counts = np.arange(1, len(widths) + 1)  # rows of at most each width
    sorted_widths = np.sort(np.asarray(widths))
    lines = np.maximum(np.minimum(np.minimum(most // sorted_widths, batch_size), counts), 1)
    index = int(np.argmax(lines * sorted_widths))
    count, width = int(lines[index]), int(sorted_widths[index])
    return Micro(count, width, padded(count * min(trained, width)))


def _widths(rows: Lengths, settings: Train, packing: bool) -> list[int]:
    """Padded widths of the lines that rows are laid into; of packed ones, the widest that there may be."""
    lengths = [max(tokens - 1, 1) for tokens in rows.tokens]
    if not packing:
        return [padded(length) for length in lengths]
    in_a_step = sum(sorted(lengths)[-settings.batch_size * settings.grad_accumulation :])
    return [padded(min(max(PACKED_POSITIONS, *lengths, 1), in_a_step))] * len(lengths)
