"""A recipe's `auto` settings as numbers, for the rows and the base at hand: once, before memory is planned."""

from __future__ import annotations

from mlx_lora.config import Recipe
from mlx_lora.models.open import OpenModel
from mlx_lora.models.shapes import network, summary
from mlx_lora.train import automatic
from mlx_lora.train.budget.costs import hidden_size
from mlx_lora.train.distributed import Processes


def resolved(recipe: Recipe, model: OpenModel, *, rows: int, valid: int) -> tuple[Recipe, automatic.Chosen]:
    """The recipe with numbers, and why each was chosen; `rows` train, `valid` validate.

    Raises RecipeError for a learning rate that can't be chosen, ModelError for an architecture that isn't known.
    """
    left = [key for key in automatic.KEYS if getattr(recipe.train, key) == "auto"]
    if not left:
        return recipe, automatic.Chosen(recipe.train, {})
    hidden = hidden_size(network(summary(model), gpu=True)) if "learning_rate" in left else 0
    chosen = automatic.choose(recipe.train, recipe.adapter, hidden=hidden, rows=rows, valid=valid)
    return recipe.model_copy(update={"train": chosen.settings}), chosen


def as_before(recipe: Recipe, run: Recipe | None, group: Processes) -> Recipe:
    """The recipe of a run that goes on: what is `auto` is what it was when the run began, on every process.

    `run` is the recipe that the first process has read; others pass None. An older run's recipe may be unreadable:
    its numbers are then chosen again.
    """
    values = run.train.model_dump(include=set(automatic.KEYS)) if run else None
    before = group.gather(values)[0] or {}
    same = {key: value for key, value in before.items() if getattr(recipe.train, key) == "auto"}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=same)})
