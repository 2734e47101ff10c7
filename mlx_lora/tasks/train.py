"""A training run from recipe to stored adapter: load, quantize, attach, read, train, save; or going on with one.

What it leaves on disk is `tasks.run`'s business. Training text is never written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_lora import paths, ui
from mlx_lora.adapters.attach import Wrappers
from mlx_lora.adapters.placement import Placement, place
from mlx_lora.config import Recipe
from mlx_lora.data.encode import Row
from mlx_lora.data.prepare import OnFile, Prepared, prepare, silent
from mlx_lora.data.virtual import virtual_of
from mlx_lora.errors import ModelError, NameTaken, RecipeError, TrainingError
from mlx_lora.machine import device, limits
from mlx_lora.methods import LORA_ONLY, LOW_RANK, parts
from mlx_lora.models.load import LoadedModel, load_stored, ready
from mlx_lora.models.open import OpenModel, open_model
from mlx_lora.models.shapes import describe as describe_model
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.store import adapter as store
from mlx_lora.store import fingerprint, registry
from mlx_lora.tasks.begin import begin, check_init
from mlx_lora.tasks.notes import notes
from mlx_lora.tasks.plan import Machine, lengths_of, plan_shape, suggest
from mlx_lora.tasks.run import RunFolder
from mlx_lora.train import checkpoint
from mlx_lora.train.budget import learn
from mlx_lora.train.budget.choose import Plan
from mlx_lora.train.distributed import Processes
from mlx_lora.train.events import Event, Finished
from mlx_lora.train.trainer import train

# What a run must have been for its peak and its pace to be believed: smaller ones are mostly overhead.
ENOUGH_STEPS, ENOUGH_BYTES = 3, 64 << 20


@dataclass
class Run:
    """A trained adapter: where it lies, what training reported, and the model that still carries it."""

    name: str
    path: Path
    finished: Finished
    loaded: LoadedModel
    prepared: Prepared
    plan: Plan | None

    def as_dict(self) -> dict[str, Any]:
        """The keys of `train --json`."""
        predicted = {"predicted_memory_bytes": self.plan.peak_memory_bytes if self.plan else None}
        return {"adapter": str(self.path), "name": self.name, **asdict(self.finished), **predicted}


@dataclass
class Listener:
    """What a screen may want to hear; `started` comes before the first step. The defaults hear nothing."""

    event: Callable[[Event], None] = lambda event: None
    stage: Callable[[str], None] = lambda text: None
    started: Callable[[], None] = lambda: None
    progress: OnFile = silent
    should_stop: Callable[[], bool] = lambda: False


def train_adapter(
    recipe: Recipe,
    *,
    force: bool = False,
    resume: bool = False,
    listener: Listener | None = None,
    group: Processes | None = None,
) -> Run:
    """Run a recipe, alone or as one of a group of processes of which the first one writes; `resume` goes on with it.

    Raises before any weight is loaded when the recipe is incomplete, its name is taken or another process trains it,
    and KeyboardInterrupt when it was asked to stop before the first step, with nothing written.
    """
    hear, group = listener or Listener(), group or Processes()
    name, opened = check(recipe, force=force or resume or group.rank > 0)
    if resume and group.size > 1:
        raise TrainingError("several processes can't go on with a run yet", hint="start again with --force")
    with ExitStack() as stack:
        if group.rank == 0:
            stack.enter_context(registry.held(name))
        if resume:
            checkpoint.newest(paths.room("runs", name))  # there is something to go on from
        try:
            return _train(recipe, opened, name, hear, group, force=force, resume=resume)
        except OSError as error:
            hint = "see to what it says; --resume goes on from the last checkpoint, if there is one"
            raise TrainingError(f"the run can't go on: {error}", hint=hint) from error


def _train(
    recipe: Recipe, opened: OpenModel, name: str, hear: Listener, group: Processes, *, force: bool, resume: bool
) -> Run:
    prepared, plan = _read(recipe, opened, hear)
    hear.stage(f"loading {recipe.model}" + (" and quantizing it" if recipe.quantize else ""))
    loaded = load_stored(opened, quantization=recipe.quantize)
    base = registry.describe_base(loaded)
    ready(loaded)
    if recipe.adapter.init in LORA_ONLY:
        hear.stage(f"beginning at {recipe.adapter.init}'s factors")
    wrappers = begin(recipe, opened, loaded, prepared.train)
    placement = place(loaded.model, recipe.adapter)
    hear.stage(summary(recipe, prepared, wrappers) + notes(loaded.model, placement, wrappers))
    manifest = describe(recipe, loaded, prepared, wrappers, base, placement)
    made_of = _made_of(recipe, base, prepared, manifest, group.size)
    group.check_same({part: str(value) for part, value in made_of.items()})
    folder = RunFolder(
        recipe, name, manifest, wrappers, len(layers_of(loaded.model)),
        made_of=checkpoint.flat(made_of), writes=group.rank == 0,
    )  # fmt: skip
    start = None
    if resume:
        start = folder.go_on(force=force)
    else:
        folder.begin()
    hear.started()
    events = train(
        loaded.model,
        prepared.train,
        prepared.valid,
        recipe.train,
        seed=recipe.seed,
        trunk=take_apart(loaded.model),
        packing=recipe.data.packing,
        scratch=folder.folder if folder.writes else None,
        processes=group,
        plan=plan,
        resume=start,
        should_stop=hear.should_stop,
    )
    try:
        with closing(events):
            for event in events:
                folder.hear(event)
                with suppress(OSError):  # a screen that has gone ends nothing
                    hear.event(event)
        assert folder.finished is not None
        if not folder.finished.iters:
            folder.forget()
            raise KeyboardInterrupt
        path = folder.save(force=force or resume)
        if plan and folder.writes and not resume:
            _learn(plan, folder.finished, prepared)
    except TrainingError:  # raised before the first step
        folder.forget()
        raise
    predicted = f", predicted {ui.size(plan.peak_memory_bytes)}" if plan else ""
    hear.stage(f"peak memory {ui.size(folder.finished.peak_memory_bytes)}{predicted}")
    return Run(name, path, folder.finished, loaded, prepared, plan)


def _read(recipe: Recipe, opened: OpenModel, hear: Listener) -> tuple[Prepared, Plan | None]:
    """The rows, and the plan for them where the model's memory can be planned; no weight is loaded for either."""
    hear.stage(f"reading {recipe.data.path}")
    prepared = prepare(
        str(recipe.data.path), recipe.data, opened.tokenizer,
        seed=recipe.seed, progress=hear.progress, virtual=virtual_of(recipe.adapter),
    )  # fmt: skip
    if recipe.train.patience and not prepared.valid:
        raise RecipeError("train.patience needs validation rows", hint="add a valid file, or set data.valid_fraction")
    try:
        return prepared, plan_rows(recipe, opened, prepared.train)
    except ModelError as error:
        hear.stage(f"its memory can't be planned: {error.message}")
        return prepared, None


def plan_rows(recipe: Recipe, model: OpenModel, rows: Sequence[Row]) -> Plan:
    """The plan of a recipe on its rows. Raises TrainingError, saying what would fit, where it doesn't fit here."""
    config, lengths = describe_model(model), lengths_of(rows)
    machine = Machine(device.on_gpu(), limits.limit_bytes(setting=recipe.train.memory_limit_gb))
    made = plan_shape(config, recipe, lengths, machine)
    if made.fits:
        return made
    fits = suggest(config, recipe, lengths, machine)
    raise TrainingError(
        f"training would take {ui.size(made.peak_memory_bytes)}, and {ui.size(made.limit_bytes)} may be used",
        hint=f"this would fit: {' '.join(fits)}" if fits else "choose a smaller model",
    )


def _learn(plan: Plan, finished: Finished, prepared: Prepared) -> None:
    """Let what was measured correct the next plan, where it was what had been planned, and large enough to say much."""
    varying = plan.peak_memory_bytes - plan.fixed
    as_planned = finished.largest_micro_batch == plan.micro.positions
    longest = max(len(row) for row in prepared.train)
    trained_most = all(len(row) <= longest for row in prepared.valid)  # else an evaluation made the peak
    if finished.iters < ENOUGH_STEPS or varying < ENOUGH_BYTES or not (as_planned and trained_most):
        return
    with suppress(OSError):  # the adapter is stored: nothing was lost
        learn.remember(plan, finished.peak_memory_bytes, finished.seconds / finished.computed_tokens)


def check(recipe: Recipe, *, force: bool) -> tuple[str, OpenModel]:
    """The run's name and its base, once everything that can be known without loading is in order."""
    missing = [key for key, value in (("model", recipe.model), ("data.path", recipe.data.path)) if not value]
    if missing:
        raise RecipeError(f"the recipe doesn't say {' and '.join(missing)}", hint="--model MODEL --data PATH set them")
    if recipe.name is None:
        raise RecipeError("the run has no name", hint="--name NAME sets it")
    assert recipe.model is not None
    check_init(recipe)
    opened = open_model(recipe.model)
    target, folder = paths.room("adapters", recipe.name), paths.room("runs", recipe.name)
    unfinished = bool(checkpoint.checkpoints(folder))
    if (target.exists() or unfinished) and not force:
        what = (
            f"{folder} holds checkpoints of an unfinished run" if unfinished else f"an adapter {recipe.name!r} exists"
        )
        go_on = "--resume to go on with it, " if unfinished else ""
        raise NameTaken(what, hint=f"{go_on}--name another one, or --force to replace it")
    paths.check_target(target, force=force)
    return recipe.name, opened


def summary(recipe: Recipe, prepared: Prepared, wrappers: Wrappers) -> str:
    """One line that says what is about to happen, the effective scale included."""
    parameters = sum(array.size for wrapper in wrappers.values() for array in wrapper.adapter_arrays().values())
    scales = sorted({wrapper.scale for wrapper in wrappers.values()})
    scale = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}"
    too_long = f" ({prepared.dropped} dropped, {prepared.truncated} truncated: too long)"
    changed = too_long if prepared.dropped or prepared.truncated else ""
    low_rank = set(parts(recipe.adapter.method)) <= set(LOW_RANK)
    size = f" of rank {recipe.adapter.rank}, scale {scale}," if low_rank else ""
    return (
        f"{len(prepared.train)} rows to train on{changed}, {len(prepared.valid)} to validate; {recipe.adapter.method}"
        f"{size} on {len(wrappers)} modules, {parameters:,} parameters"
    )


def describe(
    recipe: Recipe,
    loaded: LoadedModel,
    prepared: Prepared,
    wrappers: Wrappers,
    base: store.Base,
    placement: Placement,
) -> store.Manifest:
    """The manifest of the adapter to come: with every module's own rank, which a reader needs to build it again."""
    chat = prepared.format != "text" and recipe.data.template != "none" and loaded.tokenizer.has_chat_template
    return store.Manifest(
        method=recipe.adapter.method,
        adapter=placement.config.model_dump(),
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


def _made_of(
    recipe: Recipe, base: store.Base, prepared: Prepared, manifest: store.Manifest, processes: int
) -> dict[str, Any]:
    """What a run is made of, wherever its files lie: the same on every process of a group, and when it goes on."""
    return {
        "recipe": recipe.model_dump(
            mode="json", exclude={"model": True, "name": True, "data": {"path"}, "train": {"memory_limit_gb"}}
        ),
        "tokenizer": {"files": manifest.tokenizer, "chat_template": manifest.chat_template},
        "machine": {"processes": processes, "device": "gpu" if device.on_gpu() else "cpu", "mlx": version("mlx")},
        "model": base.model_dump(mode="json", exclude={"name"}),
        "data": {
            str(number): f"{file['rows']} rows, sha256 {file['sha256'][:16]}"
            for number, file in enumerate(prepared.files)
        },
    }
