"""Tuning: one load of the base, one training after another on it, a line in a record for each, a recipe in the end.

    tunings/<name>/tuning.json     a line for each trial that is done, written whole after each of them

A line stays valid while recipe, base, training and validation rows don't change, so the same command goes on where it
was interrupted. Test rows are never read. No adapter is stored: `train` makes it from the recipe. `study.tune` says
what is tried next.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora import methods, paths, ui
from mlx_lora.adapters.attach import detach
from mlx_lora.config import Recipe
from mlx_lora.data.batch import steps_per_epoch
from mlx_lora.data.prepare import Prepared, prepare
from mlx_lora.data.rows import trained
from mlx_lora.data.virtual import virtual_of
from mlx_lora.errors import MlxLoraError, ModelError, NotFinite, RecipeError, TrainingError
from mlx_lora.models.load import load_stored, ready
from mlx_lora.models.open import OpenModel, open_model
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.serve.engine import Engine
from mlx_lora.settings import translated
from mlx_lora.store.lock import locked
from mlx_lora.study.evaluate import row_losses
from mlx_lora.study.trials import Found, Line, Space, Trial
from mlx_lora.study.tune import Plan
from mlx_lora.tasks.begin import begin
from mlx_lora.tasks.compare import UNFINISHED, Record, made_of
from mlx_lora.tasks.plan import plan_rows
from mlx_lora.tasks.train import Listener, required
from mlx_lora.tasks.tuned import Tuned
from mlx_lora.train.events import Checkpoint, Finished, Step
from mlx_lora.train.optim import total_steps
from mlx_lora.train.trainer import train

FILE = "tuning.json"
SECTIONS = ("adapter", "data", "train")


class OutOfTime(Exception):
    """The budget ended in the middle of a trial."""


@dataclass
class Bench:
    """A base without an adapter, rows, and the training of one trial after another."""

    recipe: Recipe
    opened: OpenModel
    prepared: Prepared
    listener: Listener
    default: Trial
    checkpoints: dict[Trial, Checkpoint] = field(default_factory=dict)

    @cached_property
    def engine(self) -> Engine:
        """The base, loaded and where the recipe says so quantized: once for all trials."""
        self.listener.stage(f"loading {self.recipe.model}" + (" and quantizing it" if self.recipe.quantize else ""))
        loaded = load_stored(self.opened, quantization=self.recipe.quantize)
        ready(loaded)
        return Engine(loaded)

    def run(self, trial: Trial, looks: int, until: float) -> Line:
        """Train one trial and evaluate it `looks` times, evenly spaced; a fault of its own becomes its line's `error`.

        Raises what would stop every trial, and OutOfTime at `until`, by time.monotonic.
        """
        began, model = time.monotonic(), self.engine.loaded.model
        watch = Watch(trial, looks)
        recipe = of_trial(self.recipe, trial)
        try:
            begin(recipe, self.opened, self.engine.loaded, self.prepared.train)
            self._train(recipe, watch, until)
        except MlxLoraError as fault:
            alike = replace(trial, rate=self.default.rate, steps=self.default.steps) == self.default
            if alike and not isinstance(fault, NotFinite):
                raise  # it would stop every trial
            watch.error = fault.message
        finally:
            detach(model)
            mx.clear_cache()
        return watch.line(time.monotonic() - began)

    def _train(self, recipe: Recipe, watch: Watch, until: float) -> None:
        shape = replace(watch.trial, steps=0)
        resume = self.checkpoints.pop(shape, None)
        if resume is not None and resume.step >= watch.trial.steps:
            resume = None
        watch.at = resume.step if resume else 0
        try:
            plan = plan_rows(recipe, self.opened, self.prepared)
        except ModelError:  # an architecture whose memory isn't known
            plan = None
        model = self.engine.loaded.model
        events = train(
            model, self.prepared.train, (), recipe.train, seed=recipe.seed, trunk=take_apart(model),
            packing=recipe.data.packing, plan=plan, resume=resume, should_stop=lambda: time.monotonic() > until,
        )  # fmt: skip
        with closing(events):
            for event in events:
                if isinstance(event, Step | Finished):
                    self.listener.event(event)
                if isinstance(event, Step):
                    watch.step(event, lambda: self._look(model))
                elif isinstance(event, Checkpoint):  # a constant rate: a longer run begins with this one
                    self.checkpoints[shape] = event
                elif isinstance(event, Finished) and event.stopped_by == "interrupted":
                    raise OutOfTime
                elif isinstance(event, Finished):
                    watch.error = UNFINISHED.get(event.stopped_by)

    def _look(self, model: Any) -> np.ndarray:
        model.eval()  # the next step sets it back
        return row_losses(self.engine, self.prepared.valid, lambda: None)[1]


class Watch:
    """What is seen of one trial while it trains: when, how fast, and the best of its evaluations."""

    def __init__(self, trial: Trial, looks: int):
        self.trial = trial
        self.error: str | None = None
        self._looks = {-(-trial.steps * number // looks) for number in range(1, looks + 1)}
        self._best: np.ndarray | None = None
        self._best_step, self.at = 0, 0
        self._mark = time.monotonic()
        self._steps, self._seen = list[float](), list[float]()

    def step(self, event: Step, look: Callable[[], np.ndarray]) -> None:
        """Count a step, and evaluate where it is time."""
        now = time.monotonic()
        self._steps.append(now - self._mark)
        if event.step in self._looks:
            losses = look()
            if self._best is None or losses.sum() < self._best.sum():
                self._best, self._best_step = losses, event.step
            self._seen.append(time.monotonic() - now)
        self._mark = time.monotonic()

    def line(self, seconds: float) -> Line:
        """The trial's line. A step's time is that of the second half, when everything has been compiled."""
        half = self._steps[len(self._steps) // 2 :]
        losses = () if self.error or self._best is None else tuple(self._best.tolist())
        return Line(
            self.trial, losses, self._best_step, len(self._steps), len(self._seen), seconds,
            step_seconds=float(np.mean(half)) if half else 0.0,
            look_seconds=float(np.mean(self._seen)) if self._seen else 0.0,
            error=self.error or (None if losses else "it ended before it was evaluated"),
        )  # fmt: skip


def tune(recipe: Recipe, words: Sequence[str], *, minutes: float, listener: Listener | None = None) -> Tuned:
    """Try trainings for `minutes` and say which is best; what the `key=value` words have set in the recipe stays.

    Raises RecipeError without validation rows, and TrainingError where the time is too short for two trainings to be
    compared, or where every one of them failed. What is done is recorded after each training.
    """
    listener, started = listener or Listener(), time.monotonic()
    name, asked = required(recipe), _asked(recipe, words)
    with locked(name):
        opened = open_model(str(recipe.model))
        prepared = _rows(recipe, opened, listener)
        recipe = _automatic(recipe, opened, prepared)
        space, per_epoch = _space(recipe, asked, prepared)
        bench = Bench(recipe, opened, prepared, listener, space.default)
        record = Record(paths.room("tunings", name) / FILE)
        of = made_of(recipe) | {"asked": sorted(asked)}
        lines = _recorded(record, of)
        before = sum(line.seconds for line in lines)

        def used() -> float:
            return before + time.monotonic() - started

        for line in _trials(bench, space, lines, minutes * 60, used):
            record.put(line.trial.name, line, made_of=of)
            record.write()
            listener.stage(_said(line, space))
        found = Plan(space, lines, seconds=minutes * 60, used=used()).found()
        if found is None or found.compared < 2:
            raise _nothing(found, lines, space, minutes)
        return Tuned(recipe, asked, space, per_epoch, found, lines, used(), record.file)


def _trials(bench: Bench, space: Space, lines: list[Line], seconds: float, used: Callable[[], float]) -> Iterator[Line]:
    """Run what the plan asks for while there is time; each line is added to `lines`."""
    while (plan := Plan(space, lines, seconds=seconds, used=used())) and (trial := plan.next()):
        takes = f", about {ui.duration(plan.predicted(trial))}" if lines else ""
        bench.listener.stage(
            f"{len(lines) + 1}: {trial.name}{takes}; {used() / 60:.1f} of {seconds / 60:g} minutes used"
        )
        try:
            line = bench.run(trial, plan.looks(trial.steps), time.monotonic() + seconds - used())
        except OutOfTime:
            bench.listener.stage("the time is up: this one is left out")
            return
        lines.append(line)
        yield line


def _rows(recipe: Recipe, opened: OpenModel, listener: Listener) -> Prepared:
    listener.stage(f"reading {recipe.data.path}")
    prepared = prepare(
        str(recipe.data.path), recipe.data, opened.tokenizer,
        seed=recipe.seed, progress=listener.progress, virtual=virtual_of(recipe.adapter),
    )  # fmt: skip
    for note in prepared.notes:
        listener.stage(note)
    if not prepared.valid:
        raise RecipeError(
            "validation rows choose between trainings, and there are none",
            hint="add a valid file, or set data.valid_fraction",
        )
    return prepared


def _automatic(recipe: Recipe, opened: OpenModel, prepared: Prepared) -> Recipe:
    """The recipe as training would run it, in numbers."""
    return recipe


def _space(recipe: Recipe, asked: dict[str, Any], prepared: Prepared) -> tuple[Space, int]:
    """What may be tried, and the steps of an epoch."""
    settings, adapter = recipe.train, recipe.adapter
    per_epoch = steps_per_epoch(
        len(prepared.train), batch_size=settings.batch_size, grad_accumulation=settings.grad_accumulation
    )
    targets = adapter.targets if isinstance(adapter.targets, str) else tuple(adapter.targets)
    default = Trial(float(settings.learning_rate), adapter.rank, targets, total_steps(settings, per_epoch))
    parts = methods.parts(adapter.method)
    space = Space(
        default,
        tuple(trained(prepared.valid).tolist()),
        rates="train.learning_rate" not in asked,
        ranks="adapter.rank" not in asked and bool(set(parts) & set(methods.LOW_RANK)),
        targets="adapter.targets" not in asked and targets == "attention",
        epochs=not {"train.epochs", "train.iters"} & asked.keys(),
    )
    if not (space.rates or space.ranks or space.targets or space.epochs):
        raise RecipeError("every setting that tuning could change is given", hint="leave train.learning_rate out")
    return space, per_epoch


def _asked(recipe: Recipe, words: Sequence[str]) -> dict[str, Any]:
    """What the words have set, by dotted key."""
    values, asked = recipe.model_dump(mode="json"), dict[str, Any]()
    for word in words:
        section, _, key = translated(word).partition("=")[0].partition(".")
        key = key.partition(".")[0]
        asked |= {f"{section}.{key}": values[section][key]} if section in SECTIONS else {section: values[section]}
    return {key: value for key, value in asked.items() if key not in ("model", "name", "data.path")}


def of_trial(recipe: Recipe, trial: Trial) -> Recipe:
    """The recipe of one trial: evaluations are made beside it, and nothing is written."""
    targets = trial.targets if isinstance(trial.targets, str) else list(trial.targets)
    adapter = recipe.adapter.model_copy(update={"rank": trial.rank, "targets": targets})
    loop: dict[str, Any] = {"learning_rate": trial.rate, "iters": trial.steps, "save_every": None}
    loop |= {"eval_every": None, "patience": None}
    return recipe.model_copy(update={"adapter": adapter, "train": recipe.train.model_copy(update=loop)})


def _recorded(record: Record, of: dict[str, Any]) -> list[Line]:
    """The lines that are still valid, in the order in which they were made."""
    return [Line.read(fields) for fields in map(lambda name: record.fields(name, of), record.runs) if fields]


def _said(line: Line, space: Space) -> str:
    if line.error:
        return f"  failed: {line.error}"
    return f"  validation loss {sum(line.losses) / sum(space.tokens):.4f} in {ui.duration(line.seconds)}"


def _nothing(found: Found | None, lines: Sequence[Line], space: Space, minutes: float) -> TrainingError:
    """Why there is no result, with the time that one would take."""
    if lines and found is None:
        return TrainingError(f"every training failed: {lines[0].error}", hint="try it alone with `mlx-lora train`")
    if not lines:
        return TrainingError(f"{minutes:g} minutes are over before the first training", hint="--minutes allows more")
    plan = Plan(space, lines, seconds=minutes * 60, used=0)
    enough = math.ceil(max(plan.enough() / 60, minutes + 1))
    return TrainingError(
        f"{minutes:g} minutes are too few to compare two trainings",
        hint=f"--minutes {enough} compares short ones, and goes on from what is done",
    )
