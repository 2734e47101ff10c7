"""How a run is to be run within a limit of memory: gradient checkpointing, and how large micro-batches may be.

    rows as they are, layers kept   ->   smaller micro-batches   ->   layers computed again   ->   one row at a time

The gradient is the same in every case: what differs is time. A row is never cut, so where one alone is too long for
the limit the plan doesn't fit, and only another recipe would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from mlx_lora.config import Train, number
from mlx_lora.data.batch import MOST_POSITIONS, PACKED_POSITIONS, padded
from mlx_lora.errors import TrainingError
from mlx_lora.train.budget.costs import Costs
from mlx_lora.train.budget.predict import Micro, Parts, predict

# Micro-batches are made smaller down to this before layers are computed again: with fewer positions a processor waits.
GOOD_POSITIONS = 512
SMALLEST_STOPPED = "the smallest way to run this has been stopped for taking too much memory"


@dataclass(frozen=True)
class Experience:
    """What earlier runs have taught: `correction` multiplies all but weights, adapter and optimizer state; `seconds`
    are those of a multiplication, None where none was timed."""

    correction: float = 1.0
    seconds: float | None = None


@dataclass(frozen=True)
class Lengths:
    """Tokens of each training row, the most of a row's that carry loss, and the tokens of the validation rows."""

    tokens: Sequence[int]
    trained: int
    valid: Sequence[int] = ()


@dataclass(frozen=True)
class Way:
    """How a run is run: whether layers are computed again, and the most positions of a micro-batch."""

    recompute: bool
    most_positions: int


@dataclass(frozen=True)
class Plan:
    """What a run will hold at its peak, beside what it may, and how it has to be run for that.

    `recompute` is gradient checkpointing; micro-batches hold at most `most_positions`, or a single line, and `micro` is
    the largest of them. `states_bytes` of kept hidden states are in memory, and in `parts` under overhead: they get
    what everything else has left. `overruled` says that the run goes on although it doesn't fit, or was stopped in its
    smallest way before: `on_memory` is warn. `fixed` are the bytes
    that no choice changes, `work` the multiplications of a position, `pace` the seconds of one where they are known,
    from earlier `runs` or from `products` that were timed, as `pace_from` says.
    `kind` tells runs apart that don't correct each other. `reasons` are sentences on settings that were `auto`.
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
    pace_from: Literal["runs", "products"] | None = None
    seconds: float | None = None
    suggestion: list[str] | None = None
    states_bytes: int = 0
    overruled: bool = False
    reasons: tuple[str, ...] = ()

    @property
    def way(self) -> Way:
        return Way(self.recompute, self.most_positions)

    @property
    def room_for_states(self) -> int:
        """Bytes that the limit leaves for kept hidden states, beside everything else."""
        return max(self.limit_bytes - self.peak_memory_bytes + self.states_bytes, 0)

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
            "seconds_from": None if self.seconds is None else self.pace_from,
            "grad_checkpoint": "on" if self.recompute else "off",
            "most_positions": self.most_positions,
            "micro_batch": asdict(self.micro),
            "kept_states_bytes": self.states_bytes,
            "reasons": list(self.reasons),
        }


def plan(
    costs: Costs,
    rows: Lengths,
    settings: Train,
    limit: int,
    *,
    packing: bool = False,
    experience: Callable[[str], Experience] = lambda kind: Experience(),
    only: Way | None = None,
    smaller_than: Way | None = None,
) -> Plan:
    """The fastest way to run `settings` on `rows` within `limit` bytes, or the smallest where none fits.

    Ways are tried in the order of this file's head. A run that goes on keeps its way, `only`. After a run that was
    stopped for memory, only ways are tried that take less than its way, `smaller_than`. Where there is none, raises
    TrainingError, or with `on_memory: warn` takes the smallest way once more.
    """
    ways = _ways(rows, settings, packing)
    if only is not None:
        ways = {only: largest(_widths(rows, settings, packing), rows.trained, settings.batch_size, only.most_positions)}
    smaller = _smaller(costs, ways, smaller_than) if smaller_than in ways else ways
    if not smaller and settings.on_memory == "refuse":
        raise TrainingError(
            SMALLEST_STOPPED,
            hint="free some memory and set train.on_memory=warn to try it once more, or allow more than before by "
            "train.memory_limit_gb; a smaller model, shorter rows or fewer adapter.layers take less",
        )
    smallest = dict([*ways.items()][-1:])
    for way, micro in (smaller or smallest).items():
        made = _plan(costs, micro, limit, way, experience)
        if made.fits:
            break
    if settings.on_memory == "warn" and (not smaller or not made.fits):
        made = replace(made, overruled=True)
    states = states_bytes(costs, rows, settings)
    if 0 < states <= limit - made.peak_memory_bytes:
        parts = replace(made.parts, overhead=made.parts.overhead + states)
        made = replace(made, parts=parts, states_bytes=states, fixed=made.fixed + states)
    return made


def states_bytes(costs: Costs, rows: Lengths, settings: Train) -> int:
    """Bytes of the hidden states that later epochs read instead of running the layers below the adapter; 0 without."""
    per_step = settings.batch_size * settings.grad_accumulation
    passes = number(settings.epochs) if settings.iters is None else settings.iters * per_step / len(rows.tokens)
    if settings.cache_prefix == "off" or not costs.below or (passes <= 1 and settings.cache_prefix == "auto"):
        return 0
    return costs.size * costs.hidden * sum(length - 1 for length in [*rows.tokens, *rows.valid])


def _ways(rows: Lengths, settings: Train, packing: bool) -> dict[Way, Micro]:
    """The ways that differ for these rows, from fast to small, each with its largest micro-batch."""
    choices = {"auto": (False, True), "on": (True,), "off": (False,)}[settings.grad_checkpoint]
    widths = _widths(rows, settings, packing)
    sizes = [MOST_POSITIONS]
    while sizes[-1] > max(widths):
        sizes.append(max(sizes[-1] // 2, max(widths)))
    good = [size for size in sizes if size >= GOOD_POSITIONS] or sizes[-1:]
    ways: dict[Way, Micro] = {}
    for way in [Way(recompute, most) for some in (good, sizes) for recompute in choices for most in some]:
        micro = largest(widths, rows.trained, settings.batch_size, way.most_positions)
        if (way.recompute, micro) not in [(other.recompute, its) for other, its in ways.items()]:
            ways[way] = micro
    return ways


def _smaller(costs: Costs, ways: dict[Way, Micro], than: Way) -> dict[Way, Micro]:
    """The ways that take less than one of them by arithmetic alone, whatever earlier runs have taught."""
    peaks = {way: predict(costs, micro, recompute=way.recompute).total for way, micro in ways.items()}
    return {way: micro for way, micro in ways.items() if peaks[way] < peaks[than]}


def _plan(costs: Costs, micro: Micro, limit: int, way: Way, experience: Callable[[str], Experience]) -> Plan:
    device = "gpu" if costs.gpu else "cpu"
    kind = f"{device}, {costs.bits or 8 * costs.size} bits, layers {'computed again' if way.recompute else 'kept'}"
    before = experience(kind)
    return Plan(
        parts=predict(costs, micro, recompute=way.recompute, correction=before.correction),
        limit_bytes=limit,
        micro=micro,
        recompute=way.recompute,
        most_positions=way.most_positions,
        kind=kind,
        fixed=costs.fixed,
        work=costs.work(recompute=way.recompute),
        correction=before.correction,
        pace=before.seconds,
        pace_from=None if before.seconds is None else "runs",
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
