"""When a checkpoint is due: by time, not by a count of steps, and never for more than a small share of the time."""

from __future__ import annotations

import pytest

from mlx_lora.config import Train
from mlx_lora.train import saving
from mlx_lora.train.distributed import Processes
from mlx_lora.train.saving import SaveClock


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(saving, "time", made)
    return made


def saves(clock: Clock, *, step_seconds: float, save_seconds: float, steps: int) -> list[float]:
    """Seconds from the start at which a run of equal steps would save."""
    saver, began, found = SaveClock("auto", Processes()), clock.now, []
    for step in range(1, steps + 1):
        clock.now += step_seconds
        saver.step_done(asked=False)
        if saver.due(step):
            found.append(clock.now - began)
            clock.now += save_seconds
            saver.saved(save_seconds)
    return found


@pytest.mark.parametrize("step_seconds", [0.1, 6.0, 20.0, 100.0])
def test_at_most_half_a_minute_is_lost_from_the_beginning_on(clock: Clock, step_seconds: float) -> None:
    """Or a single step, where that takes longer."""
    found = saves(clock, step_seconds=step_seconds, save_seconds=0.0, steps=1000)
    gaps = [later - earlier for earlier, later in zip([0.0, *found], found, strict=False)]
    assert max(gaps) <= max(30.0, step_seconds) + 1e-6


def test_slow_saves_are_rarer(clock: Clock) -> None:
    """A checkpoint that takes 10 s comes every 200 s, a twentieth of the time."""
    found = saves(clock, step_seconds=1.0, save_seconds=10.0, steps=1000)
    assert found[0] <= 30 and len(found) * 10 / (1000 + len(found) * 10) <= 0.06


def test_a_recipe_may_count_steps_or_save_only_at_the_end(clock: Clock) -> None:
    clock.now += 1000
    assert [SaveClock(3, Processes()).due(step) for step in (2, 3, 6)] == [False, True, True]
    assert not SaveClock(None, Processes()).due(5)
    assert Train().save_every == "auto" and Train(save_every=None).save_every is None
