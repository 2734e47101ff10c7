"""`data check`: the report over a data path, with a model's positions and what training it would take."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_lora.config import Data, Recipe
from mlx_lora.data.check import Look, Report, check
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.data.rows import Row
from mlx_lora.errors import MlxLoraError
from mlx_lora.models.context import context_length
from mlx_lora.models.open import open_model
from mlx_lora.tasks.plan import lengths_of, plan_recipe


def check_data(
    path: str | Path,
    settings: Data,
    model: str | None = None,
    *,
    allow_leaks: bool = False,
    progress: OnFile = silent,
) -> Report:
    """Check a data path. Raises DataError where there is nothing to read, ModelError for a faulty model.

    Where a model is given and the rows have no problem, the report has the plan of the default recipe for them.
    """
    if model is None:
        return check(path, settings, progress=progress, allow_leaks=allow_leaks)
    opened = open_model(model)
    context = context_length(opened.config)
    look = Look()
    report = check(
        path, settings, opened.tokenizer, progress=progress, allow_leaks=allow_leaks, context=context, look=look
    )
    if not report.problems and (rows := look.rows.get("train")):
        report.plan = _plan(Recipe(model=model, data=settings), rows)
    return report


def _plan(recipe: Recipe, rows: Sequence[Row]) -> dict[str, Any] | None:
    """What `plan` says of these rows; None where it can't be said, as for an architecture that isn't known."""
    with suppress(MlxLoraError):
        made = plan_recipe(recipe, rows=lengths_of(rows)).as_dict()
        return {key: made[key] for key in ("fits", "peak_memory_bytes", "limit_bytes", "seconds", "suggestion")}
    return None
