"""Scale an adapter's update: a model between the base and the adapter, stored as an adapter of its own.

    y = W₀x + x · ΔWx      x = 1 is the adapter, x = 0 the base

Only methods whose whole change of a layer is one product can be scaled: for LoRA, AdaLoRA and QA-LoRA that is a factor
on their scale, and no array changes; for VeRA and bias-only tuning it is one on a vector. `auto` tries some scales with
one load, and keeps most of the gain on the task within a bound of drift on general text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_lora import files, paths
from mlx_lora.config import Adapter
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.data.splits import VALID_FIRST
from mlx_lora.errors import AdapterError, NameTaken
from mlx_lora.methods import parts
from mlx_lora.store import adapter as store
from mlx_lora.store import registry
from mlx_lora.store.adapter import StoredAdapter, wrappers_for
from mlx_lora.store.fitting import rank_axis
from mlx_lora.store.lock import locked
from mlx_lora.study.drift import Drift, Moved, spaced
from mlx_lora.study.verdict import surely
from mlx_lora.tasks.evaluate import OnRows, open_on_rows
from mlx_lora.tasks.opened import Settings
from mlx_lora.tasks.verdict import asks, general_file, general_settings

# Methods whose update is multiplied by a scale of its own, and those where one array is the update's factor.
BY_SCALE = ("lora", "adalora", "qalora")
BY_ARRAY = {"vera": "vera_b", "bitfit": "shift"}
# Scales that auto tries, then one more between the best and what is next to it.
SCALES = (0.2, 0.4, 0.6, 0.8, 1.0)
# Without a bound on drift, the smallest scale that keeps this share of the gain.
MOST_OF_IT = 0.9


@dataclass(frozen=True)
class Tried:
    """One scale: the loss on the task's rows and the share of the gain that is kept; KL from the base, and losses.

    `kl_general` and `loss_general` are null where no general text was read.
    """

    scale: float
    loss: float
    kept: float
    kl_task: float
    kl_general: float | None = None
    loss_general: float | None = None


@dataclass(frozen=True)
class Blended:
    """The new adapter, and for auto all that was tried, with the base's losses."""

    adapter: str
    name: str
    scale: float
    tried: list[Tried]
    base_loss: float | None = None
    base_loss_general: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def scaled(adapter: StoredAdapter, scale: float) -> StoredAdapter:
    """The adapter with its update times `scale`. Raises AdapterError for a method whose update isn't one product."""
    method = adapter.manifest.method
    if wrong := [part for part in parts(method) if part not in (*BY_SCALE, *BY_ARRAY)]:
        raise AdapterError(
            f"{adapter.name} is of method {method}: {' and '.join(wrong)} has no update that can be scaled",
            hint=f"methods that can: {', '.join((*BY_SCALE, *BY_ARRAY))}",
        )
    if not isfinite(scale) or scale <= 0:
        raise AdapterError(f"scale {scale:g} is not above 0", hint="0.5 is half of the update, 1 is the adapter itself")
    if method in BY_ARRAY:
        arrays = {
            name: array.astype(mx.float32) * scale if name.endswith(f".{BY_ARRAY[method]}") else array
            for name, array in adapter.arrays.items()
        }
        return replace(adapter, arrays=arrays)
    settings = Adapter.model_validate(adapter.manifest.adapter)
    patterns = {path: alpha * scale for path, alpha in settings.alpha_pattern.items()}
    manifest = adapter.manifest.model_copy(
        update={
            "adapter": {**settings.model_dump(), "alpha": settings.alpha * scale, "alpha_pattern": patterns},
            "scales": {path: own * scale for path, own in adapter.manifest.scales.items()},
        }
    )
    return replace(adapter, manifest=manifest, scale=adapter.scale * scale)


def blend(word: str, scale: float, name: str, *, force: bool = False) -> Blended:
    """Store the adapter that `word` names, with its update times `scale`, as `name`. Raises NameTaken where it is."""
    check_free(name, force=force)
    source = store.read(registry.find(word))
    made = scaled(source, scale)
    with locked(name):
        path = _write(name, source, made, scale, force=force)
    return Blended(str(path), name, scale, [])


def check_free(name: str, *, force: bool) -> None:
    """Raise NameTaken where an adapter or a run has the name; worth knowing before the work."""
    target, run = paths.room("adapters", name), paths.room("runs", name)
    if (target.exists() or run.exists()) and not force:
        what = f"an adapter {name!r}" if target.exists() else f"a run {name!r}"
        raise NameTaken(f"{what} exists", hint="choose another --name, or --force to replace it")
    paths.check_target(target, force=force)


def blend_auto(
    word: str,
    name: str,
    data: str,
    settings: Settings,
    *,
    model: str | None = None,
    forget: str | None = None,
    max_drift: float | None = None,
    force: bool = False,
    progress: OnFile = silent,
    stage: Callable[[str], None] = lambda text: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Blended:
    """Find the scale by evaluating some on validation rows of `data`, with one load, and store the adapter as `name`.

    With `max_drift` (nats of KL from the base a token, on general text) it is the scale with the least loss within it,
    else the smallest one that keeps 90 % of what the adapter gains over the base. Raises AdapterError where the adapter
    gains nothing, and where no scale is within the bound.
    """
    check_free(name, force=force)
    file = general_file(forget)
    if max_drift is not None and file is None:
        raise AdapterError("--max-drift bounds the drift on general text", hint="name a file with --forget")
    source = store.read(registry.find(word))
    scaled(source, 1.0)  # refused before anything is loaded
    opened = open_on_rows(model, [word], data, settings, prefer=VALID_FIRST, stage=stage, warn=warn)
    tried, base = search(_looking(opened, source, file, progress), max_drift, warn)
    best = choose(tried, max_drift)
    with locked(name):
        path = _write(name, source, scaled(source, best.scale), best.scale, force=force)
    return Blended(str(path), name, best.scale, tried, base[0], base[1])


def _looking(
    opened: OnRows, source: StoredAdapter, forget: Path | None, progress: OnFile
) -> Callable[[float], tuple[Moved, Moved | None]]:
    """A function of the scale: how the one adapter that is open differs from the base, on its rows and elsewhere."""
    (own,) = opened.stored
    engine, chosen = opened.engine, opened.chosen[own]
    tokenizer = engine.loaded.tokenizer
    task = chosen.questions(opened.file, tokenizer, asks(opened.file, chosen.settings), progress)
    rows, general_rows = spaced(task.rows), []
    if forget is not None:
        others = chosen.with_settings(general_settings(chosen.settings))
        general_rows = spaced(others.questions(forget, tokenizer, asks(forget, others.settings), progress).rows)
    advance = progress("trying scales", (len(rows) + len(general_rows)) * (len(SCALES) + 2))
    drift = Drift(engine, rows, advance)
    elsewhere = Drift(engine, general_rows, advance) if general_rows else None

    def look(scale: float) -> tuple[Moved, Moved | None]:
        engine.add(own, wrappers_for(engine.loaded.model, scaled(source, scale)), end=chosen.format.own_end)
        return drift.of(own), elsewhere.of(own) if elsewhere else None

    return look


def search(
    look: Callable[[float], tuple[Moved, Moved | None]],
    max_drift: float | None,
    warn: Callable[[str], None] = lambda text: None,
) -> tuple[list[Tried], tuple[float, float | None]]:
    """Look at the scales, then at one between the chosen and its neighbour; return all by scale and the base's losses.

    `warn` is told where chance may have made the adapter better. Raises AdapterError where the whole adapter isn't
    better than the base on these rows.
    """
    found = {scale: look(scale) for scale in reversed(SCALES)}
    whole, general = found[1.0]
    gain = whole.loss_base - whole.loss_tuned
    if gain <= 0:
        raise AdapterError(
            f"the adapter gains nothing on these rows: loss {whole.loss_base:.3f} without it, {whole.loss_tuned:.3f} "
            "with it",
            hint="mlx-lora verdict says more",
        )
    if not surely(whole.difference):
        count = whole.difference.rows
        warn(
            f"chance may have made the gain of {gain:.3g} nats on so few rows ({count}), and so the scale that keeps it"
        )

    def tried() -> list[Tried]:
        return [_tried(scale, *found[scale], gain) for scale in sorted(found)]

    best = choose(tried(), max_drift, refuse=False)
    # Where the best is within a bound, more may be; else less may be enough, or within it.
    step = SCALES[0] / 2
    middle = round(best.scale + step if _within(best, max_drift) else best.scale - step, 3)
    if 0 < middle < 1:
        found[middle] = look(middle)
    return tried(), (whole.loss_base, general.loss_base if general else None)


def _tried(scale: float, task: Moved, general: Moved | None, gain: float) -> Tried:
    kept = (task.loss_base - task.loss_tuned) / gain
    return Tried(
        scale, task.loss_tuned, kept, task.kl, general.kl if general else None, general.loss_tuned if general else None
    )


def _within(one: Tried, max_drift: float | None) -> bool:
    return max_drift is not None and one.kl_general is not None and one.kl_general <= max_drift


def choose(tried: list[Tried], max_drift: float | None, *, refuse: bool = True) -> Tried:
    """The scale to take. Raises AdapterError where none is within the bound; without `refuse` the smallest is taken."""
    if max_drift is None:
        return min((one for one in tried if one.kept >= MOST_OF_IT), key=lambda one: one.scale)
    within = [one for one in tried if _within(one, max_drift)]
    if within:
        return min(within, key=lambda one: one.loss)
    least = min(tried, key=lambda one: one.scale)
    if refuse:
        raise AdapterError(
            f"no scale is within {max_drift:g} nats of the base: {least.scale:g} is at {least.kl_general or 0:.3f}",
            hint="raise --max-drift, or train with a lower rate",
        )
    return least


def _write(name: str, source: StoredAdapter, made: StoredAdapter, scale: float, *, force: bool) -> Any:
    """Store what `scaled` made; arrays keep the precision that they are stored in."""
    stored = _by_module(made)
    layers = files.read_json(source.path / store.CONFIG, AdapterError).get("num_layers", -1)
    by_scale = set(parts(made.manifest.method)) <= set(BY_SCALE)
    one_scale = made.manifest.method in store.MLX_LM
    scales = dict.fromkeys(stored, made.scale) if one_scale else {**made.manifest.scales}
    manifest = made.manifest.model_copy(
        update={
            "metrics": {"blend": {"scale": scale, "by": "scale" if by_scale else "array"}},
            "parents": [f"{source.name}:{scale:g}"],
        }
    )
    shared = {key: array for key, array in made.arrays.items() if "." not in key}
    precise = {key for key, array in made.arrays.items() if array.dtype == mx.float32}
    return store.write(
        paths.room("adapters", name), stored, scales, manifest, layers,
        precise=precise, shared=shared, chat_template=source.chat_template, force=force,
    )  # fmt: skip


def _by_module(adapter: StoredAdapter) -> dict[str, dict[str, mx.array]]:
    """Arrays by module path and name, each with its module's own rank where the file has one rank for all."""
    settings = Adapter.model_validate(adapter.manifest.adapter)
    found: dict[str, dict[str, mx.array]] = {path: {} for path in adapter.manifest.modules}
    for full, array in adapter.arrays.items():
        path, _, name = full.rpartition(".")
        if not path:
            continue
        axis = rank_axis(name, array.ndim) if adapter.manifest.method in store.MLX_LM else None
        if axis is not None and array.shape[axis] > settings.rank_of(path):
            array = mx.split(array, [settings.rank_of(path)], axis=axis)[0]
        found.setdefault(path, {})[name] = array
    return found
