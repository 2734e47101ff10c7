"""Merge adapters of the home, each with a weight, into a new one. No base is loaded: the sum is of updates alone."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import mlx.core as mx

from mlx_lora import files, paths
from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError, NameTaken
from mlx_lora.store import adapter as store
from mlx_lora.store import registry
from mlx_lora.store.adapter import StoredAdapter
from mlx_lora.store.arithmetic import Merged, MergeSettings, merge
from mlx_lora.store.lock import locked
from mlx_lora.store.manifest import Manifest

T = TypeVar("T")

Weighted = Sequence[tuple[StoredAdapter, float]]


def merge_adapters(words: Sequence[str], name: str, settings: MergeSettings, *, force: bool = False) -> dict[str, Any]:
    """Merge the adapters that `words` name, `NAME` or `NAME:WEIGHT`, and store the result as `name`.

    Returns the keys of `adapters merge --json`. Raises before anything is read when the name is taken, and AdapterError
    where adapters belong to different bases or can't be added.
    """
    settings.check()
    target, run = paths.room("adapters", name), paths.room("runs", name)
    if (target.exists() or run.exists()) and not force:
        what = f"an adapter {name!r}" if target.exists() else f"a run {name!r}"
        raise NameTaken(f"{what} exists", hint="choose another --name, or --force to replace it")
    paths.check_target(target, force=force)
    adapters = [(store.read(registry.find(word)), weight) for word, weight in map(parse, words)]
    check_bases([adapter for adapter, _ in adapters])
    check_templates([adapter for adapter, _ in adapters])
    merged = merge(adapters, settings)
    with locked(name):
        _write(name, adapters, settings, merged, force=force)
        if run.is_dir():  # of the adapter that was replaced
            shutil.rmtree(run)
    return {
        "adapter": str(target),
        "name": name,
        "method": settings.method,
        "rank": max(merged.ranks.values()),
        "modules": len(merged.ranks),
        "relative_error": merged.relative_error,
        "bytes": paths.directory_bytes(target),
    }


def parse(word: str) -> tuple[str, float]:
    """`NAME` or `NAME:WEIGHT` as name and weight, 1 where none is given; a negative weight subtracts."""
    name, colon, text = word.rpartition(":")
    if not colon:
        return word, 1.0
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not name or not math.isfinite(weight):
        raise AdapterError(f"{word!r} is not NAME:WEIGHT", hint="a weight is a number, like sql:0.5 or sql:-1")
    return name, weight


def check_templates(adapters: Sequence[StoredAdapter]) -> None:
    """Raise AdapterError where adapters were trained with different chat templates of their own."""
    if len({adapter.chat_template for adapter in adapters}) > 1:
        shown = ", ".join(adapter.name for adapter in adapters if adapter.chat_template is not None)
        raise AdapterError(
            f"{shown} brought a chat template of its own, which the others don't have: merged, they couldn't be asked",
            hint="train them with the same data.template",
        )


def check_bases(adapters: Sequence[StoredAdapter]) -> None:
    """Raise AdapterError naming the bases where there are two; an adapter that doesn't say goes with any."""
    known = [(adapter, adapter.manifest.base) for adapter in adapters if adapter.manifest.base is not None]
    if len({base.fingerprint for _, base in known}) > 1:
        shown = ", ".join(f"{adapter.name} over {base.name} ({base.fingerprint[:12]})" for adapter, base in known)
        raise AdapterError(f"these adapters belong to different bases: {shown}", hint="merge adapters of one base")


def _write(name: str, adapters: Weighted, settings: MergeSettings, merged: Merged, *, force: bool) -> None:
    exact = {
        f"{path}.{key}"
        for path, named in merged.stored.items()
        for key, array in named.items()
        if not (array == array.astype(mx.bfloat16).astype(mx.float32)).all().item()
    }
    counts = [files.read_json(adapter.path / store.CONFIG, AdapterError).get("num_layers") for adapter, _ in adapters]
    layers = max(counts) if all(isinstance(count, int) and count > 0 for count in counts) else -1  # mlx-lm: all of them
    store.write(
        paths.room("adapters", name), merged.stored, dict.fromkeys(merged.ranks, 1.0),
        manifest_of(adapters, settings, merged), layers,
        precise=exact, chat_template=_common([adapter.chat_template for adapter, _ in adapters]), force=force,
    )  # fmt: skip


def manifest_of(adapters: Weighted, settings: MergeSettings, merged: Merged) -> Manifest:
    """The manifest: LoRA with scale 1 and each module's own rank, and of the parents all that they agree in."""
    manifests = [adapter.manifest for adapter, _ in adapters]
    rank = max(merged.ranks.values())
    others: dict[str, Any] = {re.escape(path): own for path, own in merged.ranks.items() if own != rank}
    stored = Adapter(rank=rank, alpha=rank, targets=list(merged.ranks), rank_pattern=others, alpha_pattern=others)
    return Manifest(
        method="lora",
        adapter=stored.model_dump(),
        modules=list(merged.ranks),
        scales=dict.fromkeys(merged.ranks, 1.0),
        base=next((manifest.base for manifest in manifests if manifest.base), None),
        tokenizer=_common([manifest.tokenizer for manifest in manifests]),
        chat_template=_common([manifest.chat_template for manifest in manifests]),
        template=_common([manifest.template for manifest in manifests]),
        thinking=_common([manifest.thinking for manifest in manifests]),
        answer_end=_common([manifest.answer_end for manifest in manifests]),
        recipe=_common_data([manifest.recipe for manifest in manifests]),
        data=[file for manifest in manifests for file in manifest.data],
        metrics={"merge": {**asdict(settings), "relative_error": merged.relative_error}},
        parents=[f"{adapter.name}:{weight:g}" for adapter, weight in adapters],
    )


def _common(values: list[T | None]) -> T | None:
    return values[0] if len(set(values)) == 1 else None


def _common_data(recipes: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """How rows become tokens, where all parents say the same: `eval` follows it."""
    settings = [(recipe or {}).get("data", {}) for recipe in recipes]
    agreed = {key: value for key, value in settings[0].items() if all(other.get(key) == value for other in settings)}
    return {"data": agreed} if agreed else None
