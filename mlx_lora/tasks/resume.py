"""What `train --resume` goes on from, and whether it may; said in plain words where it may not.

A finished run can be trained on where its learning rates would have been the same in a longer run: with a constant
schedule, and as long a warm-up. Its last checkpoint is kept for that.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mlx_lora import paths
from mlx_lora.config import Recipe
from mlx_lora.errors import TrainingError
from mlx_lora.store import run as runs
from mlx_lora.store.run import RECIPE, RunRecord
from mlx_lora.tasks.show_run import reason
from mlx_lora.train import checkpoint
from mlx_lora.train.budget.choose import Way

LENGTH = ("recipe.train.epochs", "recipe.train.iters")
# Older checkpoints name it, and it changes no byte of what is learned.
HARMLESS = ("recipe.train.save_every",)


@dataclass
class Start:
    """The run that is gone on with, and its newest checkpoint."""

    record: RunRecord
    stored: checkpoint.Stored

    @property
    def way(self) -> Way | None:
        """How the run is run, which doesn't change on the way; None after it was stopped for taking too much memory."""
        return self.stored.progress.way

    def too_large(self, recipe: Recipe) -> Way | None:
        """The way of running that took too much memory, unless `recipe` allows more than the run was allowed."""
        before = self.record.recipe.train.memory_limit_gb if self.record.recipe else None
        now, stopped = recipe.train.memory_limit_gb, self.stored.progress.too_large
        allows_more = now is not None and (before is None or now > before)
        return Way(*stopped) if stopped and not allows_more else None


def find_start(name: str, recipe: Recipe) -> Start:
    """The run called `name` and its checkpoint, read once. Raises MlxLoraError for a name that isn't there, and
    TrainingError for a run that is finished, or has nothing to go on from."""
    folder = runs.find(name)
    record = runs.read_folder_or_damaged(folder)
    if record.state == "finished":
        _check_longer(record, recipe)
    elif not record.checkpoints:
        raise TrainingError(
            f"run {name!r} holds no checkpoint to go on from: it ended before the first one",
            hint="train it without --resume: nothing of it is lost by that",
        )
    return Start(record, checkpoint.newest(folder))


def stopped_before(name: str, recipe: Recipe) -> Way | None:
    """The way of running that took too much memory when this very recipe was run under this name, or None."""
    record = runs.read_folder_or_damaged(paths.room("runs", name))
    if record.stopped_by != "memory" or record.recipe is None or _settings(record.recipe) != _settings(recipe):
        return None
    with suppress(TrainingError):  # it can't be read, and is about to be replaced
        return Start(record, checkpoint.newest(record.path)).too_large(recipe)
    return None


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What a recipe sets that has a part in the memory that it takes, wherever its files lie."""
    harmless = {"memory_limit_gb", "on_memory", "save_every"}
    return recipe.model_dump(exclude={"model": True, "name": True, "data": {"path"}, "train": harmless})


def _check_longer(record: RunRecord, recipe: Recipe) -> None:
    """Raise TrainingError unless a finished run is asked for more steps, and can do them."""
    old, finished = record.recipe, record.finished
    assert finished is not None
    done = f"run {record.name!r} is finished after {finished.iters} steps: {reason(record)}"
    key, longer = _longer(recipe if old is None else old)
    again = f"mlx-lora train {record.path / RECIPE} --force {key}={longer}"
    from_start = f"{again} trains it anew for longer; the adapter that is there stays until that has finished"
    if finished.stopped_by in ("patience", "drift", "nonfinite"):
        hint = "more steps would not change that: change the recipe and train with --force"
        raise TrainingError(done, hint=hint)
    if not record.checkpoints:
        raise TrainingError(done, hint=from_start)
    asked = recipe.train
    if old is not None and asked.iters == old.train.iters and asked.epochs in ("auto", old.train.epochs):
        raise TrainingError(done, hint=f"mlx-lora train --name {record.name} --resume {key}={longer} trains on")


def _longer(recipe: Recipe) -> tuple[str, int]:
    """The setting that makes a run longer, and twice its value."""
    train = recipe.train
    if train.iters:
        return "train.iters", 2 * train.iters
    return "train.epochs", 2 * (1 if train.epochs == "auto" else train.epochs)


def check_same_run(
    name: str, start: Start, made_of: dict[str, Any], steps: int, recipe: Recipe, *, force: bool
) -> None:
    """Raise TrainingError naming what differs from the run as it was; `steps` are those that are asked for now.

    A longer run is the same one where its steps so far would have been. Another number of processes is never.
    """
    stored = start.stored
    before, now = (values.get("machine.processes", 1) for values in (stored.made_of, made_of))
    if before != now:
        launcher = f" with `mlx.launch -n {before}`" if before > 1 else ", without mlx.launch"
        raise TrainingError(
            f"run {name!r} was trained by {_processes(before)}, and can't go on with {_processes(now)}",
            hint=f"start it{launcher}, or start again with --force and without --resume",
        )
    differences = stored.differences(made_of, ignored=HARMLESS)
    length = stored.differences({**stored.made_of, **{key: made_of.get(key) for key in LENGTH}})
    reason = _why_not_longer(start, recipe, steps) if length else None
    if length and reason is None:
        differences = stored.differences(made_of, ignored=(*HARMLESS, *LENGTH))
    if differences and not force:
        raise TrainingError(
            f"run {name!r} can't go on as it was:\n  " + "\n  ".join([*differences, *([reason] if reason else [])]),
            hint="train with the recipe, base and data it began with, or --force to go on all the same",
        )
    done = stored.checkpoint.step
    if steps < done or (steps == done and start.record.state == "finished"):
        raise TrainingError(
            f"run {name!r} has done {done} steps, and {steps} are asked for",
            hint="ask for more: train.epochs or train.iters",
        )


def _processes(number: int) -> str:
    return "one process" if number == 1 else f"{number} processes"


def _why_not_longer(start: Start, recipe: Recipe, steps: int) -> str | None:
    """Why the steps so far would have been others in a run of `steps`; None where they are the same."""
    train, before = recipe.train, start.record.planned_steps
    if train.schedule != "constant":
        return f"the learning rates of a {train.schedule} schedule depend on the number of steps"
    if "adalora" in recipe.adapter.method:
        return "adalora's ranks depend on the number of steps"
    if before is None or math.ceil(train.warmup * before) != math.ceil(train.warmup * steps):
        return "the warm-up would have had another length; train.warmup=0 has none"
    return None
