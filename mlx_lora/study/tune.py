"""Which training to try next so that a budget of seconds finds a good recipe, and what the tried ones say in the end.

    rates          on a short run first: the default's, four times of it, and so on towards the best
    longer runs    the best two and their neighbours over three times the steps, until runs are as long as they will be
    around         more epochs, more targets, a higher rank: each kept where it is better by more than chance

That is successive halving (arXiv 1502.07943) with a factor of three. Each run has its whole schedule, so a short one
ends at rate zero too. The next trial follows from the lines so far and the seconds used alone, so whoever has kept the
lines goes on where they end. Nothing here trains, reads files or looks at a clock; `tasks.tune` does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from mlx_lora.study.compare import CLOSE
from mlx_lora.study.trials import Found, Line, Space, Trial, difference

FACTOR = 3  # steps of a rung over those of the one below
LEAST_STEPS = 12  # a shorter run is mostly its warm-up
STRIDE = 2  # between neighbouring rates
WIDE = 2  # neighbours in one step, while the best is at an end
MOST_RATES, SURVIVORS, MOST_LATER = 7, 2, 4  # trials of the first sweep; of a later one at its beginning, and at most
# Shares of the budget: for a sweep that longer runs follow, for one of the longest runs, and for the last two runs.
SWEEP, ONLY_SWEEP, LAST = 0.4, 0.9, 0.65
WIDER, HIGHER = "all-linear", 4  # the other targets, and the factor of a higher rank
MARGIN = 1.05  # on what a trial is predicted to take
DEARER = 1.6  # a guess at what a step takes with other targets, until it is measured
LOOK_SHARE, MOST_LOOKS = 0.2, 5  # evaluations of a run: their share of its time, and how many at most


def rungs(steps: int) -> list[int]:
    """Lengths of runs from the shortest to `steps`, each three times the one before."""
    found = [steps]
    while (below := -(-found[0] // FACTOR)) >= LEAST_STEPS:
        found.insert(0, below)
    return found


class Plan:
    """What to do with the seconds that are left, given the lines so far."""

    def __init__(self, space: Space, lines: Sequence[Line], *, seconds: float, used: float):
        self.space, self.seconds, self.left = space, seconds, seconds - used
        self.lines = {line.trial: line for line in lines}
        self.ordered = list(lines)
        self.rungs = rungs(space.default.steps)

    def next(self) -> Trial | None:
        """The next trial; None when nothing more fits the budget, or nothing more is to be tried."""
        if not self.lines:  # the first one also measures how long a step takes
            return replace(self.space.default, steps=self.rungs[0])
        wanted = self._rates() if self.space.rates else self._one_default()
        return wanted or self._beside() or self._around()[1]

    def predicted(self, trial: Trial) -> float:
        """Seconds that a trial will take, from the latest one like it."""
        shape = (trial.rank, trial.targets)
        alike = [line for line in self.ordered if (line.trial.rank, line.trial.targets) == shape]
        return self._after((alike or self.ordered)[-1], trial)

    def _after(self, known: Line, trial: Trial) -> float:
        step = known.step_seconds * (DEARER if trial.targets != known.trial.targets else 1)
        beside = max(known.seconds - known.steps * known.step_seconds - known.looks * known.look_seconds, 0.0)
        return beside + trial.steps * step + self.looks(trial.steps) * known.look_seconds

    def enough(self) -> float:
        """Seconds that a first sweep over the shortest runs takes."""
        return MOST_RATES * self._cost(self.rungs[0])

    def looks(self, steps: int) -> int:
        """Evaluations of a run of so many steps: equal for all of that length, so that none chooses among more."""
        if not self.ordered or not self.ordered[0].look_seconds:
            return 1
        first = self.ordered[0]
        return max(1, min(MOST_LOOKS, int(LOOK_SHARE * steps * first.step_seconds / first.look_seconds)))

    def mean(self, line: Line) -> float:
        """Nats per token on the validation rows; infinite for a trial that failed."""
        return sum(line.losses) / sum(self.space.tokens) if line.losses else math.inf

    # -- rates ------------------------------------------------------------------------------------------------------

    def _rates(self) -> Trial | None:
        """The next rate at the length of run that is under way, or the first of a longer one."""
        rung = self._rung()
        if trial := self._sweep(rung):
            return trial
        longer = self._climb(rung)
        if longer is None:
            return None
        return next((trial for trial in self._survivors(rung, longer) if trial not in self.lines), None)

    def _rung(self) -> int:
        """The longest runs that have been compared with each other; at first those that a sweep has time for."""
        start = self._start()
        return max([start, *(rung for rung in self.rungs if len(self._at(rung)) > 1)])

    def _start(self) -> int:
        """The longest runs that a first sweep has time for, by the pace of the very first run: it stays the same."""
        top, sweep = self.rungs[-1], MOST_RATES - 1
        costs = {rung: sweep * self._after(self.ordered[0], self._with(0, rung)) for rung in self.rungs}
        if costs[top] <= ONLY_SWEEP * self.seconds:
            return top
        return max((rung for rung in self.rungs if costs[rung] <= SWEEP * self.seconds), default=self.rungs[0])

    def _sweep(self, rung: int) -> Trial | None:
        """At first wide steps from the default until the best has worse ones on both sides, then its neighbours.

        In longer runs the survivors, then the neighbours of their best: the best rate of longer runs is often lower.
        """
        here = sorted(self._at(rung), key=lambda line: line.trial.rate)
        first = rung == self._start() or not self._below(rung)
        trials = [self._with(0, rung)] if first else self._survivors(self._below(rung)[-1], rung)
        if all(trial in self.lines for trial in trials) and len(here) < (MOST_RATES if first else MOST_LATER):
            best = self._power(min(here, key=self.mean).trial.rate)
            trials = [self._with(best - 1, rung), self._with(best + 1, rung)]
            if first and best == self._power(here[0].trial.rate):
                trials = [self._with(best - WIDE, rung)]
            if first and best == self._power(here[-1].trial.rate) and here[-1].losses:
                trials = [self._with(best + WIDE, rung)]
            saved = self._saved(rung)
            return next((trial for trial in trials if trial not in self.lines and self._fits(trial, saved)), None)
        return next((trial for trial in trials if trial not in self.lines and self._fits(trial)), None)

    def _climb(self, rung: int) -> int | None:
        """The next length of run: the highest that two fit, by way of another one where there is time for it."""
        above = [higher for higher in self.rungs if higher > rung]
        missing = {higher: max(2 - len(self._at(higher)), 0) * self._cost(higher) for higher in above}
        reached = [higher for higher in above if missing[higher] <= self.left]
        if not reached:
            return None
        goal = reached[-1]
        if self._at(goal):
            return goal
        between = [
            mid for mid in reached if mid < goal and (SURVIVORS + 1) * self._cost(mid) + missing[goal] <= self.left
        ]
        return between[0] if between else goal

    def _saved(self, rung: int) -> float:
        """Seconds kept back for the last comparison, of two runs, when it is of longer ones than `rung`."""
        goal = max((higher for higher in self.rungs if 2 * self._cost(higher) <= LAST * self.seconds), default=rung)
        return 2 * self._cost(goal) if goal > rung else 0.0

    def _survivors(self, rung: int, longer: int) -> list[Trial]:
        finite = sorted((line for line in self._at(rung) if line.losses), key=self.mean)
        return [replace(line.trial, steps=longer) for line in finite[:SURVIVORS]]

    def _below(self, rung: int) -> list[int]:
        return [lower for lower in self.rungs if lower < rung and len(self._at(lower)) > 1]

    def _at(self, rung: int) -> list[Line]:
        """Lines of this length that differ from the default in their rate alone."""
        return [
            line for line in self.ordered if replace(line.trial, rate=self.space.default.rate) == self._with(0, rung)
        ]

    def _with(self, power: int, steps: int) -> Trial:
        """The default with 2^power times its rate, over other steps."""
        rate = self.space.default.rate
        return replace(self.space.default, rate=float(f"{rate * STRIDE**power:.3g}") if power else rate, steps=steps)

    def _power(self, rate: float) -> int:
        return round(math.log(rate / self.space.default.rate, STRIDE))

    # -- the default, and what is around the winner -----------------------------------------------------------------

    def _one_default(self) -> Trial | None:
        """Where the rate is given: the default over the longest run that two fit, to compare others with."""
        if any(line.trial.steps > self.rungs[0] or len(self.rungs) == 1 for line in self._at_any()):
            return None
        fitting = [rung for rung in self.rungs if 2 * self._cost(rung) <= self.left]
        trial = self._with(0, max(fitting, default=self.rungs[0]))
        return None if trial in self.lines else trial

    def _at_any(self) -> list[Line]:
        return [line for rung in self.rungs for line in self._at(rung)]

    def _beside(self) -> Trial | None:
        """The default as long as the best, so that it can be said what it would have lost."""
        trial = self._with(0, self._horizon())
        return trial if trial not in self.lines and self._fits(trial) else None

    def _around(self) -> tuple[Line | None, Trial | None, list[Trial]]:
        """The winner, the next trial around it that fits, and what doesn't fit."""
        best, left_out = self._best_rate(), list[Trial]()
        for change in ("shorter", "shorter", "longer", "longer", "targets", "rank"):
            trial = self._changed(best, change) if best else None
            if best is None or trial is None or trial in left_out:
                continue
            if trial in self.lines:
                best = self.lines[trial] if self._better(self.lines[trial], best) else best
            elif self._fits(trial):
                return best, trial, left_out  # what comes after builds on what this one shows
            else:
                left_out.append(trial)
        return best, None, left_out

    def _changed(self, best: Line, change: str) -> Trial | None:
        """The best trial with one thing changed, where that may be changed, wasn't, and may help."""
        space, trial = self.space, best.trial
        below = [rung for rung in self.rungs if rung < trial.steps]
        full = space.epochs and self._horizon() == space.default.steps
        if change == "shorter":  # it was better before its end than at it
            return replace(trial, steps=below[-1]) if full and below and best.best_step < trial.steps else None
        if change == "longer":
            still = trial.steps >= space.default.steps and best.best_step == trial.steps
            return replace(trial, steps=2 * trial.steps) if full and still else None
        if change == "targets":
            return replace(trial, targets=WIDER) if space.targets and trial.targets != WIDER else None
        return replace(trial, rank=HIGHER * trial.rank) if space.ranks and trial.rank == space.default.rank else None

    def _better(self, line: Line, than: Line) -> bool:
        """Better by more than chance, and by more than counts as equal."""
        if not line.losses or not than.losses:
            return bool(line.losses)
        gain = difference(than.losses, line.losses, self.space.tokens)
        return gain.sure and gain.nats > CLOSE

    def _best_rate(self) -> Line | None:
        """The lowest loss of the longest runs; of those as good by chance and by CLOSE, the nearest to the default."""
        finite = sorted((line for line in self._at(self._horizon()) if line.losses), key=self.mean)
        if not finite:
            return None
        equal = [line for line in finite if self.mean(line) - self.mean(finite[0]) <= CLOSE / 2]
        near = [line for line in equal if not difference(line.losses, finite[0].losses, self.space.tokens).sure]
        return min(near or finite[:1], key=lambda line: (abs(self._power(line.trial.rate)), line.trial.rate))

    def _horizon(self) -> int:
        """The longest runs of which there are enough to compare."""
        enough = 2 if self.space.rates else 1
        found = [rung for rung in self.rungs if len(self._at(rung)) >= enough]
        return max(found or [line.trial.steps for line in self._at_any()])

    def _cost(self, steps: int) -> float:
        return self.predicted(replace(self.space.default, steps=steps))

    def _fits(self, trial: Trial, saved: float = 0.0) -> bool:
        return MARGIN * self.predicted(trial) + saved <= self.left

    # -- the end ----------------------------------------------------------------------------------------------------

    def found(self) -> Found | None:
        """What the lines say; None where every trial has failed."""
        best, _, unfit = self._around()
        if best is None:
            return None
        shown, default = self._pair(best)
        lost = difference(default.losses, shown.losses, self.space.tokens) if default else None
        full, horizon = self.space.default.steps, self._horizon()
        unfit = [*([self.space.default] if horizon < full else []), *unfit]
        left_out = tuple((trial, self.predicted(trial)) for trial in unfit)
        steps = best.trial.steps if horizon == full else full
        return Found(best, steps, tuple(self._at(horizon)), default, lost, left_out, len(self.lines))

    def _pair(self, best: Line) -> tuple[Line, Line | None]:
        """The best and the default where both have run as they would, or else over equal steps."""
        full = self.lines.get(self.space.default)
        if full and full.losses and self._horizon() == self.space.default.steps:
            return best, full
        for rung in reversed(self.rungs):
            shown, default = self.lines.get(replace(best.trial, steps=rung)), self.lines.get(self._with(0, rung))
            if shown and default and shown.losses and default.losses:
                return shown, default
        return best, None
