"""A training run from recipe to stored adapter: load, quantize, attach, read, train, save.

Writes `adapters/<name>` (the best by validation loss, or the last without validation rows) and `runs/<name>`: the
recipe, a line of metrics per event, the last adapter, and snapshots when asked for. Training text is never written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import yaml

from mlx_lora import paths, ui
from mlx_lora.adapters.attach import Wrappers, attach
from mlx_lora.config import Recipe
from mlx_lora.data.prepare import OnFile, Prepared, prepare, silent
from mlx_lora.errors import NameTaken, RecipeError, TrainingError
from mlx_lora.models.load import LoadedModel, find_model, load_stored, ready
from mlx_lora.models.split import layers_of, split
from mlx_lora.store import adapter as store
from mlx_lora.store import fingerprint, registry
from mlx_lora.train.distributed import Processes
from mlx_lora.train.events import Evaluated, Event, Finished, Saved, Step
from mlx_lora.train.trainer import train


@dataclass
class Run:
    """A trained adapter: where it lies, what training reported, and the model that still carries it."""

    name: str
    path: Path
    finished: Finished
    loaded: LoadedModel
    prepared: Prepared

    def as_dict(self) -> dict[str, Any]:
        """The keys of `train --json`."""
        return {"adapter": str(self.path), "name": self.name, **asdict(self.finished)}


@dataclass
class Listener:
    """What a screen may want to hear; `started` comes before the first step. The defaults hear nothing."""

    event: Callable[[Event], None] = lambda event: None
    stage: Callable[[str], None] = lambda text: None
    started: Callable[[], None] = lambda: None
    progress: OnFile = silent
    should_stop: Callable[[], bool] = lambda: False


def train_adapter(
    recipe: Recipe, *, force: bool = False, listener: Listener | None = None, group: Processes | None = None
) -> Run:
    """Run a recipe, alone or as one of a group of processes of which the first one writes.

    Raises before any weight is loaded when the recipe is incomplete or its name is taken, and KeyboardInterrupt when it
    was asked to stop before the first step, with nothing written.
    """
    hear, group = listener or Listener(), group or Processes()
    name = check(recipe, force=force or group.rank > 0)
    assert recipe.model is not None and recipe.data.path is not None
    hear.stage(f"loading {recipe.model}" + (" and quantizing it" if recipe.quantize else ""))
    loaded = load_stored(recipe.model, quantization=recipe.quantize)
    base = registry.describe_base(loaded)
    ready(loaded)
    prepared = prepare(recipe.data.path, recipe.data, loaded.tokenizer, seed=recipe.seed, progress=hear.progress)
    if recipe.train.patience and not prepared.valid:
        raise RecipeError("train.patience needs validation rows", hint="add a valid file, or set data.valid_fraction")
    wrappers = attach(loaded.model, recipe.adapter, seed=recipe.seed)
    hear.stage(summary(recipe, prepared, wrappers))
    manifest = describe(recipe, loaded, prepared, wrappers, base)
    group.check_same(_alike(recipe, base, prepared))
    keeper = _Keeper(recipe, name, manifest, wrappers, len(layers_of(loaded.model)), writes=group.rank == 0)
    hear.started()
    events = train(
        loaded.model,
        prepared.train,
        prepared.valid,
        recipe.train,
        seed=recipe.seed,
        split=split(loaded.model),
        packing=recipe.data.packing,
        scratch=keeper.run if keeper.writes else None,
        processes=group,
        should_stop=hear.should_stop,
    )
    try:
        for event in events:
            keeper.hear(event)
            hear.event(event)
    except TrainingError:  # raised before the first step
        keeper.forget()
        raise
    assert keeper.finished is not None
    if not keeper.finished.iters:
        keeper.forget()
        raise KeyboardInterrupt
    path = keeper.save(force=force)
    return Run(name, path, keeper.finished, loaded, prepared)


def check(recipe: Recipe, *, force: bool) -> str:
    """The run's name, once everything that can be known without loading is in order."""
    missing = [key for key, value in (("model", recipe.model), ("data.path", recipe.data.path)) if not value]
    if missing:
        raise RecipeError(f"the recipe doesn't say {' and '.join(missing)}", hint="--model MODEL --data PATH set them")
    if recipe.name is None:
        raise RecipeError("the run has no name", hint="--name NAME sets it")
    assert recipe.model is not None
    find_model(recipe.model)
    target = paths.room("adapters", recipe.name)
    if target.exists() and not force:
        raise NameTaken(f"an adapter {recipe.name!r} exists", hint="--name another one, or --force to replace it")
    run = paths.room("runs", recipe.name)
    if list(run.glob("checkpoint-*")) and not force:
        raise NameTaken(f"{run} holds checkpoints of an unfinished run", hint="--name another one, or --force")
    return recipe.name


def summary(recipe: Recipe, prepared: Prepared, wrappers: Wrappers) -> str:
    """One line that says what is about to happen, the effective scale included."""
    parameters = sum(array.size for wrapper in wrappers.values() for array in wrapper.adapter_arrays().values())
    scales = sorted({wrapper.scale for wrapper in wrappers.values()})
    scale = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}"
    too_long = f" ({prepared.dropped} dropped, {prepared.truncated} truncated: too long)"
    changed = too_long if prepared.dropped or prepared.truncated else ""
    return (
        f"{len(prepared.train)} rows to train on{changed}, {len(prepared.valid)} to validate; {recipe.adapter.method} "
        f"of rank {recipe.adapter.rank}, scale {scale}, on {len(wrappers)} modules, {parameters:,} parameters"
    )


def describe(
    recipe: Recipe, loaded: LoadedModel, prepared: Prepared, wrappers: Wrappers, base: store.Base
) -> store.Manifest:
    """The manifest of the adapter to come."""
    chat = prepared.format != "text" and recipe.data.template != "none" and loaded.tokenizer.has_chat_template
    return store.Manifest(
        method=recipe.adapter.method,
        adapter=recipe.adapter.model_dump(),
        modules=list(wrappers),
        scales={path: wrapper.scale for path, wrapper in wrappers.items()},
        base=base,
        tokenizer=fingerprint.of_tokenizer(loaded.path),
        chat_template=fingerprint.of_template(loaded.tokenizer),
        template="chat" if chat else "none",
        recipe=shareable(recipe, base),
        data=prepared.files,
    )


def shareable(recipe: Recipe, base: store.Base) -> dict[str, Any]:
    """The recipe as a manifest holds it: an adapter may be given away, and paths of this machine stay here."""
    values = recipe.model_dump()
    values["model"] = base.name
    values["data"]["path"] = Path(values["data"]["path"]).name
    return values


def _alike(recipe: Recipe, base: store.Base, prepared: Prepared) -> dict[str, str]:
    """What every process of a group must have in common, wherever their files lie."""
    files = [(file["sha256"], file["rows"]) for file in prepared.files]
    settings = recipe.model_dump(exclude={"model": True, "name": True, "data": {"path"}})
    return {"model": base.model_dump_json(exclude={"name"}), "data": str(files), "recipe": str(settings)}


class _Keeper:
    """Listens to the events and keeps what should outlive the process."""

    def __init__(
        self, recipe: Recipe, name: str, manifest: store.Manifest, wrappers: Wrappers, layers: int, *, writes: bool
    ):
        self.manifest, self.wrappers, self.layers, self.name, self.writes = manifest, wrappers, layers, name, writes
        self.best: dict[str, mx.array] | None = None
        self.last: dict[str, mx.array] = {}
        self.finished: Finished | None = None
        self.run = paths.room("runs", name)
        self.metrics = self.run / "metrics.jsonl"
        if not writes:
            return
        if self.run.exists():
            shutil.rmtree(self.run)
        self.run.mkdir(parents=True, mode=0o700)
        (self.run / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(), sort_keys=False), encoding="utf-8")

    def hear(self, event: Event) -> None:
        if isinstance(event, Saved):
            if event.kind == "best":
                self.best = event.arrays
            elif event.kind == "last":
                self.last = event.arrays
            else:
                self._write(self.run / f"checkpoint-{event.step}", event.arrays, {"iters": event.step}, force=True)
            return
        if isinstance(event, Finished):
            self.finished = event
        if self.writes and isinstance(event, Step | Evaluated | Finished):
            line = {"event": type(event).__name__.lower(), **asdict(event)}
            with open(self.metrics, "a", encoding="utf-8") as stream:
                stream.write(ui.json_text(line) + "\n")

    def forget(self) -> None:
        """Leave nothing of a run that learned nothing."""
        if self.writes:
            shutil.rmtree(self.run)

    def save(self, *, force: bool) -> Path:
        """The best adapter under its name, the last one in the run; the model is left with what was stored."""
        assert self.finished is not None
        metrics = asdict(self.finished)
        self._write(self.run / "last", self.last, metrics, force=True)
        chosen = self.last if self.best is None else self.best
        return self._write(paths.room("adapters", self.name), chosen, metrics, force=force)

    def _write(self, out: Path, arrays: dict[str, mx.array], metrics: dict[str, Any], *, force: bool) -> Path:
        for path, wrapper in self.wrappers.items():
            for name in wrapper.adapter_params():
                wrapper[name] = arrays[f"{path}.{name}"]
        if not self.writes:
            return out
        manifest = self.manifest.model_copy(update={"metrics": metrics})
        return store.save(out, self.wrappers, manifest, self.layers, force=force)
