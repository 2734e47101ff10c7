"""Evaluate a base and adapters by name: one load, each adapter with the data settings it was trained with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mlx_lora.config import Data
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.serve.engine import Engine
from mlx_lora.store import registry
from mlx_lora.store.adapter import StoredAdapter, read, wrappers_for
from mlx_lora.store.base import base_for
from mlx_lora.study.evaluate import Questions, Result, evaluate, questions

Settings = Callable[[dict[str, Any] | None], Data]


def evaluate_adapters(
    model: str | None,
    adapters: Sequence[str],
    data: str,
    settings: Settings,
    *,
    exact: bool = False,
    max_tokens: int = 256,
    progress: OnFile = silent,
    stage: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Results of the base, by default the adapters' own, then of each adapter. `settings` turns an adapter's own data
    settings (None: it has none) into those to use; the base follows the first adapter. Raises before loading for
    adapters that don't belong."""
    stored = [read(registry.find(adapter)) for adapter in adapters]
    opened = base_for(model, stored)
    stage(f"loading {model or registry.base_name(opened.path)}")
    engine = Engine(registry.open_base(opened, stored))
    chosen: dict[str | None, Data] = {None: settings(_own(stored[0]) if stored else None)}
    for adapter, name in zip(stored, _names(stored), strict=True):
        engine.add(name, wrappers_for(engine.loaded.model, adapter))
        chosen[name] = settings(_own(adapter))
    asked: dict[Data, Questions] = {}
    for own in chosen.values():
        if own not in asked:
            asked[own] = questions(data, own, engine.loaded.tokenizer, exact=exact, progress=progress)
    work = sum(len(asked[own].rows) + len(asked[own].prompts) for own in chosen.values())
    advance = progress("evaluating", work)
    return [evaluate(engine, name, asked[own], max_tokens=max_tokens, on_row=advance) for name, own in chosen.items()]


def _own(adapter: StoredAdapter) -> dict[str, Any] | None:
    return adapter.manifest.recipe["data"] if adapter.manifest.recipe else None


def _names(stored: Sequence[StoredAdapter]) -> list[str]:
    """Names, or paths where two adapters have the same name."""
    names = [adapter.name for adapter in stored]
    return [name if names.count(name) == 1 else str(adapter.path) for name, adapter in zip(names, stored, strict=True)]
