"""A training run from recipe to stored adapter: load, quantize, attach, read, train, save; or going on with one.

What it leaves on disk is `tasks.run`'s business. Training text is never written.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlx_lora import ui
from mlx_lora.adapters.attach import Wrappers
from mlx_lora.adapters.placement import place
from mlx_lora.config import Recipe
from mlx_lora.data.batch import steps_per_epoch
from mlx_lora.data.prepare import OnFile, Prepared, prepare, silent
from mlx_lora.data.virtual import virtual_of
from mlx_lora.errors import ModelError, RecipeError, TrainingError
from mlx_lora.methods import LORA_ONLY, LOW_RANK, parts
from mlx_lora.models.chat_format import ChatFormat
from mlx_lora.models.load import LoadedModel, load_stored, ready
from mlx_lora.models.open import OpenModel, open_model
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.trunk import Trunk
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.settings import flat
from mlx_lora.store import registry
from mlx_lora.store.lock import locked
from mlx_lora.tasks.automatic import as_before, resolved
from mlx_lora.tasks.begin import begin
from mlx_lora.tasks.manifest import identity, manifest_of
from mlx_lora.tasks.notes import notes
from mlx_lora.tasks.plan import learn_from, over_limit, plan_rows
from mlx_lora.tasks.required import check, required
from mlx_lora.tasks.resume import Start, check_same_run, find_start, stopped_before
from mlx_lora.tasks.run import RunFolder
from mlx_lora.tasks.samples import likely
from mlx_lora.train.budget.choose import Plan, Way
from mlx_lora.train.checkpoint import for_each
from mlx_lora.train.distributed import Processes
from mlx_lora.train.events import Checkpoint, Evaluated, Event, Finished
from mlx_lora.train.optim import total_steps
from mlx_lora.train.trainer import train


@dataclass
class TrainedRun:
    """A trained adapter: where it lies, what training reported, and the model that still carries it.

    `recipe` has the numbers that `auto` became. `kept_old` says that an adapter of this name was there and stayed,
    since this run hasn't finished: `path` is then in the run's folder.
    """

    name: str
    path: Path
    finished: Finished
    loaded: LoadedModel
    prepared: Prepared
    plan: Plan | None
    recipe: Recipe
    kept_old: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The keys of `train --json`."""
        predicted = {"predicted_memory_bytes": self.plan.peak_memory_bytes if self.plan else None}
        return {"adapter": str(self.path), "name": self.name, **asdict(self.finished), **predicted}


@dataclass
class Listener:
    """What a screen may want to hear; `planned`, then `started`, come before the first step.

    The defaults hear nothing. `sampled`, where it is set, hears a wanted answer of a validation row at each evaluation,
    and what the model would say in its place.
    """

    event: Callable[[Event], None] = lambda event: None
    stage: Callable[[str], None] = lambda text: None
    planned: Callable[[Plan | None], None] = lambda plan: None
    sampled: Callable[[str | None, str | None], None] | None = None
    started: Callable[[], None] = lambda: None
    progress: OnFile = silent
    should_stop: Callable[[], bool] = lambda: False

    def also(self, event: Callable[[Event], None]) -> Listener:
        """This listener, and another one of the events after it."""

        def both(happened: Event) -> None:
            self.event(happened)
            event(happened)

        return replace(self, event=both)


@dataclass
class Setup:
    """All that training needs, loaded and attached."""

    loaded: LoadedModel
    prepared: Prepared
    plan: Plan | None
    folder: RunFolder


def train_adapter(
    recipe: Recipe,
    *,
    force: bool = False,
    resume: bool = False,
    listener: Listener | None = None,
    group: Processes | None = None,
) -> TrainedRun:
    """Run a recipe, alone or as one of a group of processes of which the first one writes; `resume` goes on with it.

    Raises before any weight is loaded when the recipe is incomplete, its name is taken or another process trains it,
    and KeyboardInterrupt when it was asked to stop before the first step, with nothing written. What fails on one
    process of a group alone ends all of them: PeerFailed.
    """
    listener, group = listener or Listener(), group or Processes()
    with ExitStack() as stack:
        start = None
        with group.agreed():
            name = required(recipe)
            opened = open_model(str(recipe.model))
            if group.rank == 0:
                stack.enter_context(locked(name))
            check(recipe, force=force or resume or group.rank > 0)
            if resume and group.rank == 0:
                start = find_start(name, recipe)
        try:
            if resume:
                recipe = as_before(recipe, start.record.recipe if start else None, group)
            setup = _prepare(recipe, opened, name, listener, group, start)
            resumed = _begin(setup, start, group, resume=resume, force=force)
            return _run(setup, resumed, listener, group, force=force)
        except OSError as error:
            hint = "see to what it says; --resume goes on from the last checkpoint, if there is one"
            raise TrainingError(f"the run can't go on: {error}", hint=hint) from error


def _prepare(
    recipe: Recipe, opened: OpenModel, name: str, listener: Listener, group: Processes, start: Start | None
) -> Setup:
    """Read, plan, load and attach, each step on all processes or on none."""
    with group.agreed():
        prepared, recipe = _read(recipe, opened, listener)
        smaller_than = start.too_large(recipe) if start else stopped_before(name, recipe)
        plan = _plan(recipe, opened, prepared, listener, start.way if start else None, smaller_than)
        if plan and plan.overruled:
            listener.stage(f"train.on_memory is warn: {over_limit(plan)}; the machine may swap, or end this program")
    with group.agreed():
        listener.stage(f"loading {recipe.model}" + (" and quantizing it" if recipe.quantize else ""))
        loaded = load_stored(opened, quantization=recipe.quantize)
        base = registry.describe_base(loaded)
        ready(loaded)
        if recipe.adapter.init in LORA_ONLY:
            listener.stage(f"beginning at {recipe.adapter.init}'s factors")
        wrappers = begin(recipe, opened, loaded, prepared.train)
        placement = place(loaded.model, recipe.adapter)
        listener.stage(summary(recipe, prepared, wrappers) + notes(loaded.model, placement, wrappers))
        manifest = manifest_of(recipe, loaded, prepared, wrappers, base, placement)
    made_of = identity(recipe, base, prepared, manifest, group.size)
    group.check_same({part: str(value) for part, value in made_of.items()})
    layers, writes = len(layers_of(loaded.model)), group.rank == 0
    template = ChatFormat.of(loaded.tokenizer, recipe.data).template
    folder = RunFolder(
        recipe, name, manifest, wrappers, layers,
        made_of=flat(made_of), writes=writes, chat_template=template, known=_known(prepared, plan),
    )  # fmt: skip
    return Setup(loaded, prepared, plan, folder)


def _known(prepared: Prepared, plan: Plan | None) -> dict[str, int | None]:
    """What is known of a run before its first step, for its record."""
    return {
        "rows": len(prepared.train),
        "valid_rows": len(prepared.valid),
        "predicted_memory_bytes": plan.peak_memory_bytes if plan else None,
        "memory_limit_bytes": plan.limit_bytes if plan else None,
    }


def _begin(setup: Setup, start: Start | None, group: Processes, *, resume: bool, force: bool) -> Checkpoint | None:
    """Make the run's folder, or open the one that is there; returns the checkpoint to go on from, on every process."""
    folder, made = setup.folder, None
    with group.agreed():
        if start is not None:
            settings, rows = folder.recipe.train, len(setup.prepared.train)
            per_epoch = steps_per_epoch(
                rows, batch_size=settings.batch_size, grad_accumulation=settings.grad_accumulation
            )
            steps = total_steps(settings, per_epoch)
            check_same_run(folder.name, start, folder.made_of, steps, folder.recipe, force=force)
            made = folder.go_on(start.stored, start.record)
        elif not resume:
            folder.begin()
    return for_each(made, group) if resume else None


def _run(setup: Setup, resumed: Checkpoint | None, listener: Listener, group: Processes, *, force: bool) -> TrainedRun:
    """Train and store. Nothing is left of a run that ends before its first step."""
    recipe, folder, plan = setup.folder.recipe, setup.folder, setup.plan
    trunk, prepared = take_apart(setup.loaded.model), setup.prepared
    listener.planned(plan)
    listener.started()
    events = train(
        setup.loaded.model,
        prepared.train,
        prepared.valid,
        recipe.train,
        seed=recipe.seed,
        trunk=trunk,
        packing=recipe.data.packing,
        scratch=folder.folder if folder.writes else None,
        processes=group,
        plan=plan,
        resume=resumed,
        should_stop=listener.should_stop,
    )
    try:
        with closing(events):
            for event in events:
                folder.keep(event)
                _tell(event, setup, trunk, listener)
        assert folder.finished is not None
        if not folder.finished.iters:
            folder.discard()
            raise KeyboardInterrupt
        path = folder.save(force=force or resumed is not None)
        if plan and folder.writes:
            learn_from(plan, folder.finished, prepared)
    except TrainingError:  # raised before the first step
        folder.discard()
        raise
    predicted = f", predicted {ui.size(plan.peak_memory_bytes)}" if plan else ""
    listener.stage(f"peak memory {ui.size(folder.finished.peak_memory_bytes)}{predicted}")
    return TrainedRun(
        folder.name, path, folder.finished, setup.loaded, prepared, plan, recipe, kept_old=folder.kept_old_adapter
    )


def _tell(event: Event, setup: Setup, trunk: Trunk, listener: Listener) -> None:
    """Let the screen hear an event, and see an answer after an evaluation, when the model is in evaluation mode."""
    with suppress(OSError):  # the terminal may be gone, which is no reason to stop
        listener.event(event)
        if isinstance(event, Evaluated) and listener.sampled:
            listener.sampled(*likely(trunk, setup.loaded.tokenizer, setup.prepared.valid, event.step))


def _read(recipe: Recipe, opened: OpenModel, listener: Listener) -> tuple[Prepared, Recipe]:
    """The rows, and the recipe with numbers for what was `auto`; no weight is loaded for either."""
    listener.stage(f"reading {recipe.data.path}")
    prepared = prepare(
        str(recipe.data.path), recipe.data, opened.tokenizer,
        seed=recipe.seed, progress=listener.progress, virtual=virtual_of(recipe.adapter),
    )  # fmt: skip
    for note in prepared.notes:
        listener.stage(note)
    asked = {"patience": recipe.train.patience not in (None, "auto"), "max_drift": recipe.train.max_drift is not None}
    if any(asked.values()) and not prepared.valid:
        keys = " and ".join(f"train.{key}" for key, value in asked.items() if value)
        raise RecipeError(f"{keys}: needs validation rows", hint="add a valid file, or set data.valid_fraction")
    recipe, chosen = resolved(recipe, opened, rows=len(prepared.train), valid=len(prepared.valid))
    for sentence in chosen.sentences:
        listener.stage(sentence)
    return prepared, recipe


def _plan(
    recipe: Recipe,
    opened: OpenModel,
    prepared: Prepared,
    listener: Listener,
    only: Way | None,
    smaller_than: Way | None,
) -> Plan | None:
    """The plan for the rows, None where the model's memory can't be planned; no weight is loaded for it."""
    try:
        return plan_rows(recipe, opened, prepared, only=only, smaller_than=smaller_than)
    except ModelError as error:
        listener.stage(f"its memory can't be planned: {error.message}")
        return None


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
