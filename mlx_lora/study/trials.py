"""The trials of a tuning: what they change, what they have shown, and how sure a difference between two of them is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlx_lora.study.statistics import bootstrap_t


@dataclass(frozen=True)
class Trial:
    """One training: what it changes of the recipe, and its optimizer steps."""

    rate: float
    rank: int
    targets: str | tuple[str, ...]
    steps: int

    @property
    def name(self) -> str:
        targets = self.targets if isinstance(self.targets, str) else "+".join(self.targets)
        return f"rate {self.rate:g}, rank {self.rank}, {targets}, {self.steps} steps"


@dataclass(frozen=True)
class Line:
    """What a trial has shown. `losses` are nats of each validation row at the evaluation with the lowest mean.

    `seconds` are all that it took; a step and an evaluation took `step_seconds` and `look_seconds`. Without losses it
    has failed, and `error` says why.
    """

    trial: Trial
    losses: tuple[float, ...] = ()
    best_step: int = 0
    steps: int = 0
    looks: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    look_seconds: float = 0.0
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, fields: dict[str, Any]) -> Line:
        """The line of `as_dict`, after a way through JSON."""
        of = dict(fields["trial"])
        of["targets"] = of["targets"] if isinstance(of["targets"], str) else tuple(of["targets"])
        return cls(**{**fields, "trial": Trial(**of), "losses": tuple(fields["losses"])})


@dataclass(frozen=True)
class Space:
    """The recipe as it is without tuning, over all its steps, and what of it may be changed.

    `tokens` are those with loss in each validation row.
    """

    default: Trial
    tokens: tuple[int, ...]
    rates: bool = True
    ranks: bool = True
    targets: bool = True
    epochs: bool = True


@dataclass(frozen=True)
class Difference:
    """Nats per token that the first of two lines lost against the second, with a 95 % interval; None from one row."""

    nats: float
    low: float | None = None
    high: float | None = None

    @property
    def sure(self) -> bool:
        """Whether the first is worse by more than chance."""
        return self.low is not None and self.low > 0


@dataclass(frozen=True)
class Found:
    """The end: the best trial, and the optimizer steps that the recipe should have.

    `rates` are the longest trials that differ in their rate alone. `default` is what `lost` against the best, over the
    same steps where there was no time for all. `left_out` has the seconds that each would have taken.
    """

    best: Line
    steps: int
    rates: tuple[Line, ...]
    default: Line | None
    lost: Difference | None
    left_out: tuple[tuple[Trial, float], ...]
    compared: int


def difference(worse: Sequence[float], better: Sequence[float], tokens: Sequence[int]) -> Difference:
    """The mean loss of one trial less that of another, nats per token, of rows' summed losses; with its interval.

    The interval is that of a verdict (`study.statistics`). Rows without tokens are left out.
    """
    counts = np.asarray(tokens, float)
    kept = counts > 0
    apart, counts = (np.asarray(worse, float) - np.asarray(better, float))[kept], counts[kept]
    nats = float(apart.sum() / counts.sum())
    if len(counts) < 2:
        return Difference(nats)
    return Difference(nats, *bootstrap_t(apart, counts))
