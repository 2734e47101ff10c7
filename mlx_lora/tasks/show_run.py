"""What `runs show` says of a run: its settings, its losses, why it stopped, and what can be done next."""

from __future__ import annotations

from typing import Any

from mlx_lora.config import Recipe
from mlx_lora.settings import flat
from mlx_lora.store.run import RunRecord

REASONS = {
    "epochs": "all its epochs are done",
    "iters": "all its steps are done",
    "patience": "the validation loss fell no more",
    "drift": "it had moved further from the base than train.max_drift allows",
    "interrupted": "it was interrupted",
    "memory": "it took more memory than it may",
    "nonfinite": "the loss or the gradient was not finite three steps in a row",
}


def reason(record: RunRecord) -> str | None:
    """Why a run stopped, in words; None for one that didn't come to its end."""
    return REASONS.get(record.stopped_by, record.stopped_by) if record.stopped_by else None


def details(record: RunRecord) -> dict[str, Any]:
    """What `runs show --json` prints."""
    return record.summary() | {
        "path": str(record.path),
        "settings": changed_settings(record.recipe) if record.recipe else None,
        "losses": losses(record),
        "notes": record.notes,
        "finished": record.finished.model_dump(exclude={"event"}) if record.finished else None,
        "next": next_step(record),
    }


def next_step(record: RunRecord) -> str | None:
    """What can be done with a run, by its state."""
    name = record.name
    if record.state == "running":
        return "a process is training it"
    if record.state == "unfinished":
        old = f"; the adapter {name!r} stays the one from before until then" if record.replaces else ""
        return f"mlx-lora train --name {name} --resume goes on from step {record.checkpoints[-1]}{old}"
    if record.state == "abandoned":
        return f"it ended before its first checkpoint: train it again, or mlx-lora runs remove {name}"
    return f"mlx-lora adapters show {name}" if record.state == "finished" else record.fault


def losses(record: RunRecord, *, rows: int = 10) -> list[dict[str, Any]]:
    """At most `rows` lines of a table: the mean training loss since the line before, and the validation loss there.

    The lines are at the evaluations where there are some, else evenly spaced; the last step is always one.
    """
    measured = {line.step: line.loss for line in record.evaluations}
    steps = sorted(measured) or [line.step for line in record.steps]
    steps = sorted({*steps, record.step} - {0}) if record.steps else steps
    shown = [steps[(index + 1) * len(steps) // min(rows, len(steps)) - 1] for index in range(min(rows, len(steps)))]
    table, before = [], 0
    if 0 in measured:
        table.append({"step": 0, "train_loss": None, "valid_loss": measured[0]})
    for step in shown:
        since = [line.loss for line in record.steps if before < line.step <= step and line.loss is not None]
        mean = sum(since) / len(since) if since else None
        table.append({"step": step, "train_loss": mean, "valid_loss": measured.get(step)})
        before = step
    return table


def changed_settings(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says differently from the defaults, by dotted key."""
    defaults = flat(Recipe().model_dump(mode="json"))
    return {key: value for key, value in flat(recipe.model_dump(mode="json")).items() if defaults.get(key) != value}
