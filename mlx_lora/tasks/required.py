"""What a run needs before anything is loaded: a model, data, and a name that is free."""

from __future__ import annotations

from mlx_lora import paths
from mlx_lora.config import Recipe
from mlx_lora.errors import NameTaken, RecipeError
from mlx_lora.store import run as runs
from mlx_lora.tasks.begin import check_start


def required(recipe: Recipe) -> str:
    """The run's name. Raises RecipeError for a recipe without a name, a model or data."""
    missing = [key for key, value in (("model", recipe.model), ("data.path", recipe.data.path)) if not value]
    if missing:
        raise RecipeError(f"the recipe doesn't say {' and '.join(missing)}", hint="--model MODEL --data PATH set them")
    if recipe.name is None:
        raise RecipeError("the run has no name", hint="--name NAME sets it")
    return recipe.name


def check(recipe: Recipe, *, force: bool) -> str:
    """The run's name, once everything that can be known without loading is in order."""
    name = required(recipe)
    check_start(recipe)
    target, folder = paths.room("adapters", name), paths.room("runs", name)
    record = runs.read_folder_or_damaged(folder)
    unfinished = bool(record.checkpoints) and record.state != "finished"
    if (target.exists() or unfinished) and not force:
        what = f"{folder} holds checkpoints of an unfinished run" if unfinished else f"an adapter {name!r} exists"
        go_on = "--resume to go on with it, " if unfinished else ""
        raise NameTaken(what, hint=f"{go_on}--name another one, or --force to replace it")
    paths.check_target(target, force=force)
    return name
