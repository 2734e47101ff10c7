"""What a merged adapter still knows of its parents' tasks: evaluated on their rows, or the commands that do it.

Weighted sums of updates can cancel: a merge whose weights are exact may have lost one of its tasks altogether.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlx_lora.config import Data
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.errors import AdapterError
from mlx_lora.store import registry
from mlx_lora.store.adapter import read
from mlx_lora.tasks.evaluate import evaluate_adapters
from mlx_lora.tasks.merge import parse

# A task has fallen where the merge keeps less than this share of what the parent's loss gained over the base.
LEAST_KEPT = 0.5


@dataclass(frozen=True)
class TaskKept:
    """Mean losses on one parent's rows. `kept` is the share of the parent's gain over the base that the merge has."""

    parent: str
    data: str
    base_loss: float
    parent_loss: float
    merged_loss: float
    kept: float

    @property
    def fell(self) -> bool:
        return self.kept < LEAST_KEPT

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "fell": self.fell}


def rows_of_parents(words: Sequence[str], data: Sequence[str]) -> dict[str, str]:
    """A path of rows by parent, from `NAME=PATH` or, without names, in the order of the adapters that `words` name.

    Raises AdapterError for a name that isn't merged, and for more paths than adapters.
    """
    parents = [read(registry.find(parse(word)[0])).name for word in words]
    found: dict[str, str] = {}
    for place, text in enumerate(data):
        name, equals, path = text.partition("=")
        if equals and name in parents:
            found[name] = path
        elif equals or place >= len(parents):
            raise AdapterError(
                f"--data {text}: {name!r} is none of the adapters that are merged ({', '.join(parents)})"
                if equals
                else f"--data {text}: there are more paths than adapters ({', '.join(parents)})",
                hint="--data NAME=PATH for each adapter, or the paths in the order of the adapters",
            )
        else:
            found[parents[place]] = text
    return found


def base_of(parent: str, model: str | None) -> str:
    """The base to evaluate over: `model`, or the one that the adapter was trained over.

    Raises AdapterError where the adapter doesn't say.
    """
    if model is not None:
        return model
    base = read(registry.find(parent)).manifest.base
    if base is None:
        raise AdapterError(f"{parent} doesn't say which base it belongs to", hint="name it with --model")
    return base.name


def check_merge(
    merged: str, rows: dict[str, str], *, model: str | None = None, progress: OnFile = silent
) -> list[TaskKept]:
    """Evaluate the base, each parent and the merge on that parent's rows."""
    found = []
    for parent, path in rows.items():
        adapters, over = [parent, merged], base_of(parent, model)
        evaluation = evaluate_adapters(over, adapters, path, _settings, progress=progress)
        base, own, ours = (result.loss for result in evaluation.results)
        gained = base - own
        kept = (base - ours) / gained if gained > 0 else 1.0
        found.append(TaskKept(parent, path, base, own, ours, kept))
    return found


def commands(words: Sequence[str], merged: str, *, model: str | None = None) -> list[str]:
    """The `eval` commands that say whether the merge still does its parents' tasks, one for each."""
    lines = []
    for word in words:
        adapter = read(registry.find(parse(word)[0]))
        base = shlex.quote(model or (adapter.manifest.base.name if adapter.manifest.base else "MODEL"))
        rows = f"ROWS_OF_{adapter.name}"  # a manifest doesn't know where they are
        lines.append(f"mlx-lora eval --model {base} --adapter {adapter.name} --adapter {merged} --data {rows} --exact")
    return lines


def _settings(own: dict[str, Any] | None) -> Data:
    return Data.model_validate({key: value for key, value in (own or {}).items() if key != "path"})
