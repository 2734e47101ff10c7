"""Runs that were stopped for taking too much memory: what `--resume`, `--force` and the next plan make of that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.config import Recipe
from mlx_lora.errors import TrainingError
from mlx_lora.machine import limits
from mlx_lora.recipe import load_recipe
from mlx_lora.store import run as runs
from mlx_lora.tasks.plan import plan_recipe
from mlx_lora.tasks.train import Listener, TrainedRun, train_adapter
from mlx_lora.train import checkpoint
from mlx_lora.train.budget import learn
from mlx_lora.train.budget.choose import Way
from tests.conftest import questions


@pytest.fixture
def recipe(tiny_path: Path, write_rows: Callable[..., Path]) -> Recipe:
    """Eight rows of some 130 tokens in a step: there are ways to run it from all at once to one row at a time."""
    rows = [{"text": "".join(row["prompt"] + row["completion"] for row in questions(10, start=at))} for at in range(8)]
    train = {"iters": 20, "batch_size": 8, "save_every": None, "memory_limit_gb": 8, "cache_prefix": "off"}
    data = {"path": str(write_rows(rows)), "valid_fraction": 0}
    values = {"model": str(tiny_path), "name": "mine", "data": data, "train": train, "adapter": {"rank": 2}}
    return Recipe.model_validate(values)


def changed(recipe: Recipe, *overrides: str) -> Recipe:
    return load_recipe(None, list(overrides), settings=recipe.model_dump())


@pytest.fixture
def about_to_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that never has enough free memory, so that each run is stopped after its first step."""
    monkeypatch.setattr(limits, "LEAST_FREE", 1 << 60)


def way(run: TrainedRun) -> Way:
    assert run.plan is not None
    return run.plan.way


def test_a_run_stopped_for_memory_at_its_first_step_is_resumed_in_smaller_ways_until_there_is_none(
    recipe: Recipe, about_to_swap: None
) -> None:
    """A stop taught nothing at steps 1 and 2, and never when resumed: the same plan was chosen for ever."""
    recipe = changed(recipe, "train.grad_checkpoint=on")  # fewer ways
    run = train_adapter(recipe)
    ways = [way(run)]
    while True:
        assert (run.finished.stopped_by, run.finished.iters) == ("memory", len(ways))
        assert len(ways) < 20, "it goes on for ever"
        try:
            run = train_adapter(recipe, resume=True)
        except TrainingError as error:
            refused = error
            break
        ways.append(way(run))
    assert len(ways) == 4 and len(set(ways)) == 4 and ways[-1] == Way(True, 256), "one row at a time"
    assert "the smallest way to run this has been stopped" in refused.message and "train.on_memory=warn" in refused.hint
    said: list[str] = []
    run = train_adapter(changed(recipe, "train.on_memory=warn"), resume=True, listener=Listener(stage=said.append))
    assert way(run) == ways[-1] and run.finished.iters == len(ways) + 1, "as the hint says"
    assert any("the smallest way to run this has been stopped" in line for line in said)
    allowed = train_adapter(changed(recipe, "train.memory_limit_gb=9"), resume=True)
    assert way(allowed) == ways[0], "more is allowed than before"


def test_the_same_recipe_trained_anew_after_a_memory_stop_is_run_in_a_smaller_way(
    recipe: Recipe, about_to_swap: None
) -> None:
    first = train_adapter(recipe)
    second = train_adapter(recipe, force=True)
    before, after = way(first), way(second)  # predicted bytes can't be compared: the stop has corrected the second ones
    assert (after.recompute, -after.most_positions) > (before.recompute, -before.most_positions)
    other = train_adapter(changed(recipe, "adapter.rank=1"), force=True)
    assert way(other) == way(first), "what another recipe takes isn't known"


def test_a_limit_that_was_overruled_stops_no_run_and_what_it_measures_corrects_the_next_plan(recipe: Recipe) -> None:
    """A refused run taught nothing, and `--force` didn't reach the plan."""
    small = changed(recipe, "train.memory_limit_gb=0.001", "train.iters=3")
    with pytest.raises(TrainingError, match="may be used") as refused:
        train_adapter(small, force=True)
    assert "train.on_memory=warn" in refused.value.hint and "train.memory_limit_gb=" in refused.value.hint
    said: list[str] = []
    run = train_adapter(changed(small, "train.on_memory=warn"), listener=Listener(stage=said.append))
    assert run.finished.stopped_by == "iters" and way(run).recompute
    assert any("train.on_memory is warn" in line for line in said)


@pytest.mark.real
def test_what_an_overruled_run_measures_corrects_the_next_plan(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_lora.tasks.plan.ENOUGH_BYTES", 0)  # of so small a model
    small = changed(recipe, "train.memory_limit_gb=0.001", "train.on_memory=warn", "train.iters=3")
    before = plan_recipe(small)
    run = train_adapter(small)
    after = plan_recipe(small)
    assert run.plan.overruled and before.correction == 1.0 and before.kind == after.kind
    measured = (run.finished.peak_memory_bytes - before.fixed) / (before.peak_memory_bytes - before.fixed)
    expected = 1 + learn.WEIGHT * (min(max(measured, 1 / learn.MOST), learn.MOST) - 1)
    assert after.correction == pytest.approx(expected) and after.correction != 1.0


@pytest.mark.real
def test_a_resumed_run_keeps_its_way_and_teaches_by_it(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was planned anew, and what one way had taken corrected the plans of the other."""
    taught: list[Any] = []
    monkeypatch.setattr(learn, "remember", lambda plan, *_, **__: taught.append(plan))
    monkeypatch.setattr("mlx_lora.tasks.plan.ENOUGH_BYTES", 0)
    steps = iter(range(99))
    tight = changed(recipe, "train.memory_limit_gb=0.001", "train.on_memory=warn")
    first = train_adapter(tight, listener=Listener(should_stop=lambda: next(steps) >= 4))
    assert first.finished.stopped_by == "interrupted" and way(first).recompute
    again = iter(range(99))
    stop = Listener(should_stop=lambda: next(again) >= 4)
    second = train_adapter(changed(recipe, "train.memory_limit_gb=8"), resume=True, listener=stop)
    assert way(second) == way(first) and [plan.way for plan in taught] == [way(first)] * 2
    with pytest.raises(TrainingError, match="may be used") as refused:
        train_adapter(changed(recipe, "train.memory_limit_gb=0.001"), resume=True)
    assert refused.value.hint.startswith("free some memory; "), "no change to a recipe that the run is bound to"
    assert checkpoint.newest(runs.find("mine")).progress.way == way(first)
