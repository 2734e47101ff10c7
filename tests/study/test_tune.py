"""Tuning on made-up losses: what is tried within a budget, and what is chosen."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from mlx_lora.study.compare import CLOSE
from mlx_lora.study.statistics import of_losses
from mlx_lora.study.trials import Line, Space, Trial, difference
from mlx_lora.study.tune import Plan, rungs

RATE, FULL = 1e-3, 250
DEFAULT = Trial(RATE, 8, "attention", FULL)


@dataclass
class World:
    """Losses and seconds that trials have here. `best` is the power of two of the best rate, over the default's."""

    best: float = 0.0
    curve: float = 0.05
    diverges: float = 3.5  # powers above the best
    noise: float = 0.0
    rows: int = 60
    step: float = 1.0
    look: float = 3.0
    beside: float = 5.0
    lowest: int = 10**6  # the step at which validation is best
    gain: Callable[[Trial], float] = lambda trial: 0.0
    free: dict[str, bool] = field(default_factory=dict)

    def loss(self, trial: Trial) -> float | None:
        power = math.log2(trial.rate / RATE)
        if power > self.best + self.diverges:
            return None
        return 0.3 + 2 / (1 + trial.steps / 20) + self.curve * (power - self.best) ** 2 - self.gain(trial)

    def line(self, trial: Trial, looks: int) -> Line:
        step = self.step * (1.5 if trial.targets == "all-linear" else 1)
        seconds = self.beside + trial.steps * step + looks * self.look
        loss, generator = self.loss(trial), np.random.default_rng(zlib.crc32(trial.name.encode()))
        if loss is None:
            return Line(trial, (), 0, trial.steps, looks, seconds, step, self.look, "not finite")
        each = np.array(self.space.tokens) * self.hardness * (loss + self.noise * generator.normal(size=self.rows))
        return Line(
            trial, tuple(each.tolist()), min(trial.steps, self.lowest), trial.steps, looks, seconds, step, self.look
        )

    @property
    def hardness(self) -> np.ndarray:
        return np.random.default_rng(1).exponential(size=self.rows)

    @property
    def space(self) -> Space:
        tokens = np.random.default_rng(0).integers(1, 20, self.rows)
        return Space(DEFAULT, tuple(tokens.tolist()), **self.free)

    def tune(self, seconds: float, lines: list[Line] | None = None) -> tuple[Plan, list[Line], float]:
        """The plan when it has ended, its lines, and the seconds that they took."""
        lines = lines if lines is not None else []
        used = sum(line.seconds for line in lines)
        while trial := (plan := Plan(self.space, lines, seconds=seconds, used=used)).next():
            lines.append(self.line(trial, plan.looks(trial.steps) if lines else 1))
            used += lines[-1].seconds
            assert len(lines) < 40
        return plan, lines, used


ONLY_RATES = {"ranks": False, "targets": False, "epochs": False}


@pytest.mark.parametrize("best", [-4, -2, -1, 0, 1, 2, 4])
@pytest.mark.parametrize("seconds", [900, 1800, 4000])
def test_the_rate_is_within_two_hundredths_of_the_best_of_a_grid_of_eight(best: int, seconds: float) -> None:
    """All of these budgets are for far fewer than eight full runs and the sweep, or just enough; all are kept."""
    world = World(best, free=ONLY_RATES)
    plan, _, used = world.tune(seconds)
    found = plan.found()
    assert found is not None and used <= seconds
    grid = [world.loss(replace(DEFAULT, rate=RATE * 2.0**power)) for power in range(-5, 6)]
    full = world.loss(replace(found.best.trial, steps=FULL))
    assert full is not None and full <= min(loss for loss in grid if loss is not None) + CLOSE


def test_short_runs_come_first_and_the_survivors_run_longer() -> None:
    _, lines, _ = World(2, free=ONLY_RATES).tune(900)
    counts = Counter(line.trial.steps for line in lines)
    assert list(counts) == [28, FULL] and counts[28] >= 5 and counts[FULL] >= 2
    short = sorted((line for line in lines if line.trial.steps == 28), key=lambda line: sum(line.losses))
    assert {line.trial.rate for line in lines if line.trial.steps == FULL} == {line.trial.rate for line in short[:2]}


def test_with_plenty_of_time_every_rate_runs_in_full() -> None:
    _, lines, _ = World(1, free=ONLY_RATES).tune(6000)
    assert {line.trial.steps for line in lines[1:]} == {FULL}


def test_runs_are_three_times_as_long_from_rung_to_rung_and_none_is_too_short() -> None:
    assert rungs(250) == [28, 84, 250]
    assert rungs(20) == [20] and rungs(36) == [12, 36]


def test_a_default_that_diverges_leads_to_lower_rates() -> None:
    world = World(-6, diverges=2.5, free=ONLY_RATES)
    plan, lines, _ = world.tune(1800)
    found = plan.found()
    assert lines[0].error and found is not None
    assert world.loss(found.best.trial) is not None and found.best.trial.rate < RATE / 8
    assert found.lost is None  # the default has no loss


def test_where_everything_fails_nothing_is_found() -> None:
    plan, lines, used = World(-30).tune(900)
    assert plan.found() is None and used <= 900 and 1 < len(lines) < 10


@pytest.mark.parametrize("seconds", [1.0, 40.0])
def test_a_budget_for_one_run_compares_nothing(seconds: float) -> None:
    plan, lines, _ = World().tune(seconds)
    found = plan.found()
    assert len(lines) == 1 and found is not None and found.compared == 1
    assert plan.enough() > seconds


@pytest.mark.parametrize("seconds", [120, 300, 500, 700, 1100, 2500])
@pytest.mark.parametrize("best", [-3, 0, 3])
def test_every_budget_is_kept_and_what_is_left_out_is_said(seconds: float, best: float) -> None:
    plan, lines, used = World(best).tune(seconds)
    found = plan.found()
    assert used <= seconds and found is not None and found.compared == len(lines)
    left = {trial for trial, _ in found.left_out}
    assert (DEFAULT in left) == (max(line.trial.steps for line in lines) < FULL)
    assert all(predicted > 0 for _, predicted in found.left_out)
    assert found.steps == FULL or found.best.trial.steps == found.steps


def test_what_chance_can_explain_doesnt_move_the_default() -> None:
    """Rates are all alike, and losses of rows differ by noise alone."""
    plan, _, _ = World(curve=0.0, noise=0.02, free=ONLY_RATES).tune(6000)
    found = plan.found()
    assert found is not None and found.best.trial == DEFAULT
    assert found.lost is not None and found.lost.nats == 0


def test_what_the_default_would_have_lost_is_the_difference_with_an_interval() -> None:
    world = World(2, noise=0.05, free=ONLY_RATES)
    plan, _, _ = world.tune(4000)
    found = plan.found()
    assert found is not None and found.lost is not None and found.default is not None
    assert found.default.trial == DEFAULT
    apart = sum(found.default.losses) - sum(found.best.losses)
    assert found.lost.nats == pytest.approx(apart / sum(world.space.tokens))
    assert found.lost.sure and found.lost.low is not None and found.lost.high is not None
    assert found.lost.low < found.lost.nats < found.lost.high


@pytest.mark.parametrize(
    ("gain", "wanted"),
    [
        (lambda trial: 0.1 * math.log2(trial.steps / FULL), {"steps": 4 * FULL}),  # 0.1 more with each doubling
        (lambda trial: 0.0, {}),
        (lambda trial: -0.4 * (trial.steps > 100) - 0.1 * (trial.steps < 50), {"steps": 84}),
        (lambda trial: 0.1 * (trial.targets == "all-linear"), {"targets": "all-linear"}),
        (lambda trial: 0.01 * (trial.targets == "all-linear"), {}),  # less than what counts as equal
        (lambda trial: 0.1 * (trial.rank == 32), {"rank": 32}),
        (lambda trial: -0.1 * (trial.rank == 32), {}),
    ],
)
def test_epochs_targets_and_rank_change_only_where_that_helps(
    gain: Callable[[Trial], float], wanted: dict[str, object]
) -> None:
    """Losses here fall with the steps by themselves; that is taken out, so that `gain` alone decides."""
    flat = World(gain=lambda trial: gain(trial) + 2 / (1 + trial.steps / 20) - 2 / (1 + FULL / 20))
    plan, _, used = replace(flat, lowest=90 if wanted.get("steps") == 84 else 10**6).tune(30_000)
    found = plan.found()
    assert found is not None and used <= 30_000
    assert found.best.trial == replace(DEFAULT, **wanted)  # type: ignore[arg-type]
    assert found.steps == wanted.get("steps", FULL)


@pytest.mark.parametrize("seconds", [300, 900, 1800, 6000])
def test_whoever_goes_on_from_the_lines_tries_the_same(seconds: float) -> None:
    world = World(2, noise=0.05)
    _, lines, _ = world.tune(seconds)
    for kept in range(len(lines)):
        _, again, _ = world.tune(seconds, lines[:kept])
        assert again == lines


def test_more_time_goes_on_from_what_was_done() -> None:
    world = World(2)
    first = world.tune(300)[1]
    plan, lines, _ = world.tune(4000, list(first))
    found = plan.found()
    assert lines[: len(first)] == first and found is not None and found.best.trial.steps >= FULL


def test_what_was_asked_for_stays() -> None:
    free = {"rates": False, "ranks": True, "targets": False, "epochs": False}
    _, lines, _ = World(2, free=free).tune(4000)
    assert {line.trial.rate for line in lines} == {RATE} and {line.trial.targets for line in lines} == {"attention"}
    assert {line.trial.rank for line in lines} == {8, 32} and lines[-1].trial.steps == FULL


def test_runs_of_one_length_are_evaluated_equally_often() -> None:
    _, lines, _ = World(1).tune(6000)
    looks = {steps: {line.looks for line in lines[1:] if line.trial.steps == steps} for steps in (FULL, 2 * FULL)}
    assert looks == {FULL: {5}, 2 * FULL: {5}}


def test_a_difference_is_that_of_the_token_means_with_the_interval_of_a_verdict() -> None:
    """Also near that of the delta method, rows being many; a row without tokens changes nothing."""
    generator = np.random.default_rng(3)
    tokens = generator.integers(1, 9, 200)
    a, b = generator.exponential(2, 200) * tokens, generator.exponential(1.7, 200) * tokens
    found = difference([*a, 0.0], [*b, 0.0], [*tokens, 0])
    assert found.nats == pytest.approx(a.sum() / tokens.sum() - b.sum() / tokens.sum())
    assert (found.low, found.high) == of_losses(b, a, tokens).interval
    spread = np.std((a - b) - found.nats * tokens) / tokens.mean() / math.sqrt(200)
    for value, normal in ((found.low, -1.96), (found.high, 1.96)):
        assert value == pytest.approx(found.nats + normal * spread, abs=0.25 * spread)


def test_one_row_gives_no_interval() -> None:
    found = difference([3.0], [1.0], [2])
    assert (found.nats, found.low, found.high, found.sure) == (1.0, None, None, False)


def test_a_line_comes_back_from_json_as_it_was() -> None:
    import json

    line = World().line(replace(DEFAULT, targets=("q_proj", "v_proj")), 2)
    assert Line.read(json.loads(json.dumps(line.as_dict()))) == line
