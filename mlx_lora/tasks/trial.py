"""One base, and one training after another on it: what a tuning's trials are made with.

The base is loaded once. A trial attaches its adapter, trains it, evaluates it row by row, and takes it out again, which
gives back the very same arrays. Nothing is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.adapters.attach import detach
from mlx_lora.config import Recipe
from mlx_lora.data.prepare import Prepared
from mlx_lora.errors import MlxLoraError, ModelError, NotFinite
from mlx_lora.models.load import load_stored, ready
from mlx_lora.models.open import OpenModel
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.serve.engine import Engine
from mlx_lora.study.losses import row_losses
from mlx_lora.study.trials import Line, Trial
from mlx_lora.tasks.begin import begin
from mlx_lora.tasks.compare import UNFINISHED
from mlx_lora.tasks.plan import plan_rows
from mlx_lora.tasks.train import Listener
from mlx_lora.train.events import Checkpoint, Finished, Step
from mlx_lora.train.trainer import train


class OutOfTime(Exception):
    """The budget ended in the middle of a trial."""


@dataclass
class Bench:
    """A base without an adapter, rows, and the training of one trial after another."""

    recipe: Recipe
    opened: OpenModel
    prepared: Prepared
    default: Trial
    listener: Callable[[], Listener] = Listener  # one for each trial
    stage: Callable[[str], None] = lambda text: None
    checkpoints: dict[Trial, Checkpoint] = field(default_factory=dict)

    @cached_property
    def engine(self) -> Engine:
        """The base, loaded and where the recipe says so quantized: once for all trials."""
        self.stage(f"loading {self.recipe.model}" + (" and quantizing it" if self.recipe.quantize else ""))
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
        try:
            plan = plan_rows(recipe, self.opened, self.prepared)
        except ModelError:  # an architecture whose memory isn't known
            plan = None
        model, listener = self.engine.loaded.model, self.listener()
        events = train(
            model, self.prepared.train, (), recipe.train, seed=recipe.seed, trunk=take_apart(model),
            packing=recipe.data.packing, plan=plan, resume=resume, should_stop=lambda: time.monotonic() > until,
        )  # fmt: skip
        with closing(events):
            for event in events:
                if isinstance(event, Step | Finished):
                    listener.event(event)
                if isinstance(event, Step):
                    watch.step(event, lambda: self._look(model))
                elif isinstance(event, Checkpoint):  # a constant rate: a longer run begins with this one
                    self.checkpoints[shape] = event
                elif isinstance(event, Finished) and event.stopped_by == "interrupted":
                    raise OutOfTime
                elif isinstance(event, Finished):
                    watch.error = UNFINISHED.get(event.stopped_by)

    def _look(self, model: nn.Module) -> np.ndarray:
        model.eval()  # the next step sets it back
        return row_losses(self.engine, self.prepared.valid, lambda: None)[1]


class Watch:
    """What is seen of one trial while it trains: when, how fast, and the best of its evaluations."""

    def __init__(self, trial: Trial, looks: int):
        self.trial = trial
        self.error: str | None = None
        self._looks = {-(-trial.steps * number // looks) for number in range(1, looks + 1)}
        self._best: np.ndarray | None = None
        self._best_step = 0
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


def of_trial(recipe: Recipe, trial: Trial) -> Recipe:
    """The recipe of one trial: evaluations are made beside it, and nothing is written."""
    targets = trial.targets if isinstance(trial.targets, str) else list(trial.targets)
    adapter = recipe.adapter.model_copy(update={"rank": trial.rank, "targets": targets})
    loop: dict[str, Any] = {"learning_rate": trial.rate, "iters": trial.steps, "save_every": None}
    loop |= {"eval_every": None, "patience": None, "max_drift": None}
    return recipe.model_copy(update={"adapter": adapter, "train": recipe.train.model_copy(update=loop)})
