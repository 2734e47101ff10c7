"""A tuning's trials on one loaded base: they leave it as it was, and learn what training learns."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora.data.prepare import prepare
from mlx_lora.errors import AdapterError
from mlx_lora.models.open import open_model
from mlx_lora.recipe import load_recipe
from mlx_lora.study.trials import Trial
from mlx_lora.tasks.train import train_adapter
from mlx_lora.tasks.trial import Bench, OutOfTime
from tests.conftest import questions

TRIAL = Trial(0.01, 4, "attention", 4)
LONG_AGO, NEVER = 0.0, float("inf")


@pytest.fixture
def bench(tiny_path: Path, write_rows: Callable[..., Path]) -> Callable[..., Bench]:
    """`bench("key=value", …)`: 24 rows to train on, 5 to validate."""
    write_rows(questions(5, start=100), name="valid.jsonl")
    data = write_rows(questions(24)).parent

    def make(*words: str) -> Bench:
        given = {"model": str(tiny_path), "data.path": str(data), "name": "tried"}
        recipe = load_recipe(None, ["train.learning_rate=0.01", "adapter.rank=4", *words], settings=given)
        opened = open_model(str(tiny_path))
        return Bench(recipe, opened, prepare(data, recipe.data, opened.tokenizer), TRIAL)

    return make


def test_a_trial_ends_where_training_does_and_takes_its_adapter_out(bench: Callable[..., Bench]) -> None:
    made = bench()
    model = made.engine.loaded.model
    before = dict(tree_flatten(model.parameters()))
    line = made.run(TRIAL, 1, NEVER)
    after = dict(tree_flatten(model.parameters()))
    assert before.keys() == after.keys() and all(mx.array_equal(before[name], after[name]).item() for name in before)
    words = ["train.iters=4", "train.eval_every=4", "train.learning_rate=0.01", "adapter.rank=4"]
    given = {"model": made.recipe.model, "data.path": made.recipe.data.path, "name": "mine"}
    finished = train_adapter(load_recipe(None, words, settings=given)).finished
    tokens = sum(row.trained for row in made.prepared.valid)
    assert finished.valid_loss == pytest.approx(sum(line.losses) / tokens, rel=1e-5)
    assert len(line.losses) == 5 and (line.best_step, line.steps, line.looks) == (4, 4, 1)
    assert line.error is None and line.seconds > 4 * line.step_seconds > 0


@pytest.mark.real
def test_trials_dont_depend_on_those_before(bench: Callable[..., Bench]) -> None:
    made = bench()
    first = made.run(TRIAL, 2, NEVER)
    made.run(replace(TRIAL, rate=0.5, rank=2, targets=("q_proj",)), 1, NEVER)
    assert made.run(TRIAL, 2, NEVER).losses == first.losses


@pytest.mark.real
def test_the_best_evaluation_counts(bench: Callable[..., Bench]) -> None:
    """A rate that destroys the model in the end: what it was like earlier is what training would keep."""
    made = bench("train.schedule=constant", "train.warmup=0", "train.max_grad_norm=null")
    line = made.run(replace(TRIAL, rate=3.0, steps=8), 8, NEVER)
    assert line.best_step < 8 and line.looks == 8


@pytest.mark.real
def test_a_longer_run_goes_on_from_a_constant_rates_checkpoint(bench: Callable[..., Bench]) -> None:
    """To the same losses as a run from the start, with fewer steps taken."""
    made = bench("train.schedule=constant", "train.warmup=0")
    made.run(TRIAL, 1, NEVER)
    longer = made.run(replace(TRIAL, steps=10), 1, NEVER)
    alone = bench("train.schedule=constant", "train.warmup=0").run(replace(TRIAL, steps=10), 1, NEVER)
    assert (longer.steps, alone.steps) == (6, 10)
    np.testing.assert_array_equal(longer.losses, alone.losses)


@pytest.mark.real
def test_a_falling_rate_begins_again(bench: Callable[..., Bench]) -> None:
    made = bench("train.schedule=cosine")
    made.run(TRIAL, 1, NEVER)
    assert made.run(replace(TRIAL, steps=6), 1, NEVER).steps == 6


def test_the_end_of_the_time_ends_a_trial(bench: Callable[..., Bench]) -> None:
    made = bench()
    with pytest.raises(OutOfTime):
        made.run(TRIAL, 1, time.monotonic())
    assert not [name for name, _ in tree_flatten(made.engine.loaded.model.parameters()) if "lora" in name]


def test_what_is_wrong_with_a_trial_alone_is_its_error_and_what_stops_all_is_raised(
    bench: Callable[..., Bench],
) -> None:
    made = bench()
    line = made.run(replace(TRIAL, targets=("no_such",)), 1, NEVER)
    assert line.error is not None and "no_such" in line.error and line.losses == ()
    made.default = replace(TRIAL, targets=("no_such",))
    with pytest.raises(AdapterError, match="no_such"):
        made.run(made.default, 1, NEVER)


def test_a_loss_that_is_not_finite_is_the_trials_error(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lora.errors import NotFinite
    from mlx_lora.tasks import trial

    def broken(*words: Any) -> Any:
        raise NotFinite("the logits are not finite")

    monkeypatch.setattr(trial, "row_losses", broken)
    line = bench().run(TRIAL, 1, NEVER)
    assert line.error == "the logits are not finite" and line.losses == ()
