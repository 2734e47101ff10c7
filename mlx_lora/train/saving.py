"""When a checkpoint is due: every so many steps, or by the clock."""

from __future__ import annotations

import time
from typing import Literal

from mlx_lora.train.distributed import Processes

# By the clock, at most so many seconds of training may be lost,
SAVE_SECONDS = 30.0
# and writing checkpoints may take at most this share of the time.
MOST_SHARE = 0.05


class SaveClock:
    """`every` is a recipe's train.save_every: a number of steps, `auto` for the clock, or None for never.

    Call `step_done` after each optimizer step, and `saved` with the seconds that a checkpoint took. Of several
    processes, which have to save at the same step, the first one's clock asks all of them, with the sums of a step.
    """

    def __init__(self, every: int | Literal["auto"] | None, processes: Processes):
        self.every, self._interval, self._processes = every, SAVE_SECONDS, processes
        self._asked = False
        self._saved = self._stepped = time.perf_counter()
        self._step_seconds = 0.0

    def asks(self) -> bool:
        """Whether this is the process that decides for several, and a checkpoint is due by its clock."""
        return self._processes.size > 1 and self._processes.rank == 0 and self.every == "auto" and self._late()

    def step_done(self, *, asked: bool) -> None:
        """A step was computed; `asked` says whether a process of several asked for a checkpoint with it."""
        self._asked |= asked
        now = time.perf_counter()
        self._step_seconds, self._stepped = now - self._stepped, now

    def saved(self, seconds: float) -> None:
        """A checkpoint was written: the next one by the clock comes later where this one took long."""
        self._interval = max(SAVE_SECONDS, seconds * (1 - MOST_SHARE) / MOST_SHARE)
        self._saved = self._stepped = time.perf_counter()
        self._asked = False

    def due(self, step: int) -> bool:
        """Whether to save after `step` steps."""
        if self.every == "auto":
            return self._late() if self._processes.size == 1 else self._asked
        return self.every is not None and step % self.every == 0

    def _late(self) -> bool:
        """Whether another step like the last one would make it too long since the last checkpoint."""
        return time.perf_counter() - self._saved + self._step_seconds > self._interval
