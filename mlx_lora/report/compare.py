"""Two runs side by side: what was set differently, what came of it, and their curves on one scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_lora.report.text import LABEL, Points, plot
from mlx_lora.settings import flat
from mlx_lora.store.run import RunRecord
from mlx_lora.study.ending import ending

HEIGHT, GAP, LEAST = 8, 3, 30
# Settings that differ between any two runs, or say nothing about what they learn.
NAMES = ("name",)


def figures(record: RunRecord) -> dict[str, Any]:
    """What came of a run. Losses are in nats a token, memory in bytes; None where the record doesn't say."""
    done, first = record.finished, record.first
    found = ending(record)
    base = next((line.loss for line in record.evaluations if line.step == 0), None)
    return {
        "state": record.state,
        "stopped_by": record.stopped_by,
        "steps": record.step,
        "epochs": done.epochs if done else None,
        "rows": first.rows if first else None,
        "valid_rows": first.valid_rows if first else None,
        "base_valid_loss": base,
        "train_loss": record.train_loss,
        "best_valid_loss": record.best_valid_loss,
        "best_step": record.kept.step if record.kept else None,
        "seconds": done.seconds if done else None,
        "trained_tokens": done.trained_tokens if done else None,
        "peak_memory_bytes": done.peak_memory_bytes if done else None,
        "predicted_memory_bytes": first.predicted_memory_bytes if first else None,
        "ending": found.text if found else None,
    }


def settings(one: RunRecord, other: RunRecord) -> dict[str, tuple[Any, Any]]:
    """Settings with different values, by dotted key; empty where a recipe can't be read."""
    if one.recipe is None or other.recipe is None:
        return {}
    a, b = (flat(record.recipe.model_dump(mode="json")) for record in (one, other) if record.recipe)
    keys = [key for key in dict.fromkeys([*a, *b]) if key not in NAMES and a.get(key) != b.get(key)]
    return {key: (a.get(key), b.get(key)) for key in keys}


def as_dict(one: RunRecord, other: RunRecord) -> dict[str, Any]:
    """What `runs compare --json` prints."""
    return {
        "runs": [one.name, other.name],
        "settings": {key: list(values) for key, values in settings(one, other).items()},
        "results": [figures(one), figures(other)],
        "losses": [[[line.step, line.loss] for line in record.evaluations] for record in (one, other)],
    }


def curves(one: RunRecord, other: RunRecord, width: int) -> list[str]:
    """Both runs' losses as text, on one scale: beside each other, or below each other in a narrow terminal."""
    training, validation = zip(*map(_points, (one, other)), strict=True)
    values = [y for points in (*training, *validation) for _, y in points]
    if not values:
        return []
    beside = (width - GAP) // 2 >= LEAST
    each = min((width - GAP) // 2 if beside else width, 70)
    end = max(one.step, other.step, 1)
    plots = []
    for record, curve, marks in zip((one, other), training, validation, strict=True):
        drawn = plot(curve, marks, width=each, height=HEIGHT, end=end, low=min(values), high=max(values))
        axis = f"{'':{LABEL}} └{f' step {end}':─>{each - LABEL - 2}}"
        plots.append([record.name, *drawn, axis])
    if not beside:
        return [*plots[0], *plots[1]]
    return [f"{left:{each}}{'':{GAP}}{right}".rstrip() for left, right in zip(*plots, strict=True)]


def _points(record: RunRecord) -> tuple[Points, Sequence[tuple[float, float]]]:
    """(training, validation) losses by step."""
    return (
        [(line.step, line.loss) for line in record.steps if line.loss is not None],
        [(line.step, line.loss) for line in record.evaluations if line.loss is not None],
    )
