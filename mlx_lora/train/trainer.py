"""The training loop: rows in, events out.

It knows nothing about files, screens or recipes' paths: it is given a model with adapters attached, rows, and
settings, and yields events. Gradients and losses are sums until the optimizer step, which divides once by the number
of tokens. A step that isn't finite changes nothing and is counted.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_lora.config import Train
from mlx_lora.data.batch import Batch, by_length, collate, epoch_steps, steps_per_epoch
from mlx_lora.data.encode import Row
from mlx_lora.errors import TrainingError
from mlx_lora.models.split import Split, layers_of
from mlx_lora.train import optim
from mlx_lora.train.events import Evaluated, Event, Finished, Interrupted, Saved, Step
from mlx_lora.train.loss import Arrays, as_arrays, loss_function
from mlx_lora.train.recompute import recomputed

MOST_SKIPPED = 3
# Compiled graphs are kept by shape; beyond this many the old ones are dropped, since each holds megabytes.
MOST_SHAPES = 32
LOSS_WINDOW = 10


@dataclass
class Progress:
    """Counters of a run."""

    step: int = 0
    trained_tokens: int = 0
    computed_tokens: int = 0
    real_tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=LOSS_WINDOW))
    valid_loss: float | None = None
    evaluated_at: int = 0
    best_loss: float | None = None
    evaluations_without_gain: int = 0

    @property
    def train_loss(self) -> float | None:
        """Token-weighted mean of the last steps."""
        tokens = sum(count for _, count in self.recent)
        return sum(loss for loss, _ in self.recent) / tokens if tokens else None


def train(
    model: nn.Module,
    rows: Sequence[Row],
    valid: Sequence[Row],
    settings: Train,
    *,
    seed: int = 0,
    split: Split | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Train what is trainable in `model` on `rows`, evaluating on `valid`; see `events` for what is yielded.

    The same seed and rows give the same bytes. Three steps in a row that are not finite end the run, with what was
    learned before them. Raises TrainingError when there is nothing to train.
    """
    if not tree_flatten(model.trainable_parameters()):
        raise TrainingError("nothing is trainable", hint="attach an adapter first")
    per_epoch = steps_per_epoch(len(rows), batch_size=settings.batch_size, grad_accumulation=settings.grad_accumulation)
    steps = settings.iters or settings.epochs * per_epoch
    with ExitStack() as stack:
        if settings.grad_checkpoint == "on":
            stack.enter_context(recomputed(layers_of(model)))
        stack.callback(model.eval)
        run = _Run(model, settings, steps, seed, split)
        yield from _loop(run, rows, valid, should_stop, per_epoch)


def _loop(
    run: _Run, rows: Sequence[Row], valid: Sequence[Row], should_stop: Callable[[], bool], per_epoch: int
) -> Iterator[Event]:
    settings, done = run.settings, run.progress
    stopped_by = "iters" if settings.iters else "epochs"

    # where it starts from
    yield from _evaluate(run, valid, should_stop)
    for step_rows in _endless(rows, settings, run.seed):
        # leave early, with everything kept
        if done.step == run.steps:
            break
        if reason := _reason_to_stop(run, should_stop):
            stopped_by = reason
            break
        # one optimizer step
        yield run.step([collate([rows[index] for index in micro]) for micro in step_rows])
        # evaluate once in a while, and at the end
        last = done.step == run.steps
        if last or (settings.eval_every and done.step % settings.eval_every == 0):
            yield from _evaluate(run, valid, should_stop)
        if settings.save_every and done.step % settings.save_every == 0 and not last:
            yield Saved(done.step, "step", run.adapter())
    if stopped_by == "interrupted":
        yield Interrupted(done.step)
    if done.step:
        yield Saved(done.step, "last", run.adapter())
    yield run.finished(stopped_by, done.step / per_epoch)


def _reason_to_stop(run: _Run, should_stop: Callable[[], bool]) -> str | None:
    if should_stop():
        return "interrupted"
    if run.progress.skipped_in_a_row == MOST_SKIPPED:
        return "nonfinite"
    patience = run.settings.patience
    return "patience" if patience and run.progress.evaluations_without_gain >= patience else None


def _endless(rows: Sequence[Row], settings: Train, seed: int) -> Iterator[list[Any]]:
    """The micro-batches of one optimizer step after another, epoch after epoch."""
    lengths = [len(row) for row in rows]
    epoch = 0
    while True:
        yield from epoch_steps(
            lengths,
            batch_size=settings.batch_size,
            grad_accumulation=settings.grad_accumulation,
            seed=seed,
            epoch=epoch,
        )
        epoch += 1


def _evaluate(run: _Run, valid: Sequence[Row], should_stop: Callable[[], bool]) -> Iterator[Event]:
    """One evaluation, unless there is nothing to evaluate on or it was interrupted on the way."""
    done = run.progress
    loss = run.evaluate(valid, should_stop) if valid else None
    if loss is None:
        return
    # the untrained adapter is where it starts from, never the best: whoever stops early keeps what was learned
    best = done.step > 0 and math.isfinite(loss) and (done.best_loss is None or loss < done.best_loss)
    done.evaluations_without_gain = 0 if best or not done.step else done.evaluations_without_gain + 1
    done.valid_loss, done.evaluated_at = loss, done.step
    yield Evaluated(done.step, loss, best)
    if best:
        done.best_loss = loss
        yield Saved(done.step, "best", run.adapter())


class _Run:
    """The compiled step and its state."""

    def __init__(self, model: nn.Module, settings: Train, steps: int, seed: int, split: Split | None):
        self.model, self.settings, self.steps, self.seed = model, settings, steps, seed
        self.progress = Progress()
        self.optimizer = optim.build(settings, steps)
        self.optimizer.init(model.trainable_parameters())
        self.rate = optim.schedule(settings, steps)
        self.zeros = tree_map(mx.zeros_like, model.trainable_parameters())
        self.loss_sum = loss_function(model, split)
        mx.random.seed(seed)
        mx.eval(model.state, self.optimizer.state)
        mx.reset_peak_memory()
        self.start = time.perf_counter()
        self.shapes: set[tuple[int, ...]] = set()
        self._compile()

    def _compile(self) -> None:
        model, optimizer = self.model, self.optimizer
        loss_and_gradients = nn.value_and_grad(model, self.loss_sum)
        state = [model.state, optimizer.state, mx.random.state]

        def accumulate(loss: mx.array, totals: Any, *arrays: mx.array) -> tuple[mx.array, Any]:
            loss_here, gradients = loss_and_gradients(*arrays)
            return loss + loss_here, tree_map(mx.add, totals, gradients)

        def apply(loss: mx.array, totals: Any, tokens: mx.array) -> tuple[mx.array, mx.array]:
            gradients = tree_map(lambda total: total / tokens, totals)
            norm = optim.global_norm(gradients)
            finite = mx.isfinite(loss) & mx.isfinite(norm)
            if self.settings.max_grad_norm is not None:
                shrink = mx.minimum(self.settings.max_grad_norm / (norm + 1e-6), 1.0)
                gradients = tree_map(lambda gradient: gradient * shrink, gradients)
            parameters, memory = model.trainable_parameters(), tree_map(lambda array: array, optimizer.state)
            optimizer.update(model, gradients)
            model.update(_where(finite, model.trainable_parameters(), parameters))
            optimizer.state.update(_where(finite, optimizer.state, memory))  # in place: the compiled step holds it
            return norm, finite

        self.accumulate = mx.compile(accumulate, inputs=state, outputs=state)
        self.apply = mx.compile(apply, inputs=state, outputs=state)
        self.evaluated = mx.compile(self.loss_sum, inputs=[model.state], outputs=[])

    def arrays(self, batch: Batch) -> Arrays:
        """A batch on the device; its shape is remembered, and graphs are compiled anew when there are too many."""
        arrays = as_arrays(batch)
        self.shapes.add((*arrays[0].shape, arrays[1].size, self.model.training))
        if len(self.shapes) > MOST_SHAPES:
            self.shapes.clear()
            self._compile()
        return arrays

    def step(self, batches: list[Batch]) -> Step:
        """One optimizer step over micro-batches whose gradients are summed."""
        began, done = time.perf_counter(), self.progress
        self.model.train()
        loss, totals = mx.array(0.0), self.zeros
        tokens = sum(batch.trained for batch in batches)
        for batch in batches:
            loss, totals = self.accumulate(loss, totals, *self.arrays(batch))
            mx.async_eval(loss, totals)  # so that one micro-batch's activations are freed before the next one's
            done.computed_tokens += batch.inputs.size
            done.real_tokens += batch.real
        rate = float(self.rate(mx.array(done.step - done.skipped)).item())
        norm, finite = self.apply(loss, totals, mx.array(float(tokens)))
        mx.eval(loss, norm, finite, self.model.trainable_parameters(), self.optimizer.state, mx.random.state)
        done.step += 1
        done.trained_tokens += tokens
        self._count(bool(finite.item()), float(loss.item()), tokens)
        return Step(
            step=done.step,
            steps=self.steps,
            loss=float(loss.item()) / tokens,
            learning_rate=rate,
            gradient_norm=float(norm.item()),
            tokens=tokens,
            tokens_per_second=tokens / (time.perf_counter() - began),
            peak_memory=mx.get_peak_memory(),
            skipped=not finite.item(),
        )

    def _count(self, finite: bool, loss: float, tokens: int) -> None:
        done = self.progress
        if finite:
            done.skipped_in_a_row = 0
            done.recent.append((loss, tokens))
            return
        done.skipped += 1
        done.skipped_in_a_row += 1

    def evaluate(self, rows: Sequence[Row], should_stop: Callable[[], bool]) -> float | None:
        """Mean loss per token over all of `rows`, always in the same order and batches; None when asked to stop."""
        self.model.eval()
        total, tokens = 0.0, 0
        for batch in by_length(rows, self.settings.batch_size):
            if should_stop():
                return None
            total += float(self.evaluated(*self.arrays(batch)).item())
            tokens += batch.trained
        return total / tokens

    def adapter(self) -> dict[str, mx.array]:
        """The trainable arrays as they are now; arrays are immutable, so this copies nothing."""
        return dict(tree_flatten(self.model.trainable_parameters()))

    def finished(self, stopped_by: str, epochs: float) -> Finished:
        done, seconds = self.progress, time.perf_counter() - self.start
        return Finished(
            iters=done.step,
            epochs=round(epochs, 4),
            train_loss=done.train_loss,
            valid_loss=done.valid_loss if done.evaluated_at == done.step else None,
            best_valid_loss=done.best_loss,
            trained_tokens=done.trained_tokens,
            computed_tokens=done.computed_tokens,
            padding_fraction=1 - done.real_tokens / done.computed_tokens if done.computed_tokens else 0.0,
            seconds=seconds,
            tokens_per_second=done.trained_tokens / seconds,
            peak_memory_bytes=mx.get_peak_memory(),
            trainable_parameters=sum(array.size for array in self.adapter().values()),
            skipped_steps=done.skipped,
            stopped_by=stopped_by,
        )


def _where(condition: mx.array, new: Any, old: Any) -> Any:
    return tree_map(lambda a, b: mx.where(condition, a, b) if isinstance(a, mx.array) else a, new, old)
