"""`auto` in a run: numbers before memory is planned, the same in manifest, record and plan, and when a run goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.config import Recipe, Train
from mlx_lora.errors import RecipeError
from mlx_lora.store import registry
from mlx_lora.store import run as runs
from mlx_lora.store.adapter import read
from mlx_lora.tasks.automatic import as_before
from mlx_lora.tasks.plan import plan_recipe
from mlx_lora.tasks.train import Listener, train_adapter
from mlx_lora.train import automatic
from mlx_lora.train.distributed import Processes
from mlx_lora.train.events import Step


@pytest.fixture
def recipe(tiny_path: Path, write_rows: Callable[..., Path]) -> Callable[..., Recipe]:
    file = write_rows([{"prompt": f"{number} + 1 =", "completion": str(number + 1)} for number in range(20)])

    def make(data: dict[str, Any] | None = None, **train: Any) -> Recipe:
        values = {"path": str(file), **(data or {})}
        settings = {"batch_size": 6, "save_every": None} | train
        return Recipe.model_validate(
            {"model": str(tiny_path), "name": "mine", "data": values, "adapter": {"rank": 4}, "train": settings}
        )

    return make


def numbers(train: Train) -> dict[str, Any]:
    return train.model_dump(include=set(automatic.KEYS))


def test_a_run_with_nothing_but_model_data_and_name_records_numbers(recipe: Callable[..., Recipe]) -> None:
    said: list[str] = []
    run = train_adapter(recipe(), listener=Listener(stage=said.append))
    wanted = {"epochs": 10, "learning_rate": 0.011, "eval_every": 3, "patience": 5}
    record = runs.read("mine")
    assert record.recipe is not None and numbers(record.recipe.train) == wanted
    manifest = read(registry.find("mine")).manifest.recipe
    assert {key: manifest["train"][key] for key in wanted} == wanted
    assert [line for line in said if line.startswith("train.")] == list(plan_recipe(recipe()).reasons)
    assert [line.partition(" is ")[0] for line in said if line.startswith("train.")] == [
        f"train.{key}" for key in wanted
    ]
    assert run.finished.iters == 30 and run.finished.best_valid_loss is not None
    assert [line.step for line in record.evaluations] == list(range(0, 31, 3))


def test_a_run_that_goes_on_for_longer_keeps_its_numbers(recipe: Callable[..., Recipe]) -> None:
    short = recipe(schedule="constant", warmup=0.0, epochs=2, patience=None)
    train_adapter(short)
    before = runs.read("mine").recipe
    longer = recipe(schedule="constant", warmup=0.0, epochs=4, patience=None)
    train_adapter(longer, resume=True)
    after = runs.read("mine").recipe
    assert before is not None and after is not None
    assert numbers(after.train) == numbers(before.train) | {"epochs": 4}
    assert numbers(train_numbers(longer)) != numbers(after.train), "a run that began with four would have others"


def train_numbers(recipe: Recipe) -> Train:
    return automatic.choose(recipe.train, recipe.adapter, hidden=64, rows=18, valid=2).settings


def test_an_interrupted_run_goes_on_with_auto_as_it_began(recipe: Callable[..., Recipe]) -> None:
    seen: list[int] = []
    asked = Listener(
        event=lambda event: seen.append(event.step) if isinstance(event, Step) else None,
        should_stop=lambda: len(seen) >= 4,
    )
    assert train_adapter(recipe(epochs=3), listener=asked).finished.stopped_by == "interrupted"
    assert train_adapter(recipe(epochs=3), resume=True).finished.stopped_by == "epochs"
    filled = as_before(recipe(learning_rate=0.5), runs.read("mine").recipe, Processes())
    assert filled.train.learning_rate == 0.5 and filled.train.epochs == 3, "what is set is not replaced"


def test_without_validation_rows_nothing_is_evaluated_and_what_needs_them_is_refused(
    recipe: Callable[..., Recipe],
) -> None:
    none = {"valid_fraction": 0.0}
    run = train_adapter(recipe(none, iters=2))
    assert run.finished.valid_loss is None and run.finished.iters == 2
    for settings in ({"patience": 2, "eval_every": 1}, {"max_drift": 0.1}):
        with pytest.raises(RecipeError, match=f"train.{next(iter(settings))}: needs validation rows"):
            train_adapter(recipe(none, **settings), force=True)


def test_a_plan_without_rows_counts_one_epoch(recipe: Callable[..., Recipe], tiny_path: Path) -> None:
    made = plan_recipe(Recipe(model=str(tiny_path)))
    assert made.reasons == () and made.seconds is None
