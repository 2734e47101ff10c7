"""The training loop: rows in, events out.

It knows nothing about screens or recipes: it is given a model with adapters attached, rows, and settings, and yields
events. While the device computes a step, a thread prepares the batches of the next ones and the events of the last one
are handled: a step's figures are read only when the step after it is on its way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora import ui
from mlx_lora.config import Train
from mlx_lora.data.ahead import ahead
from mlx_lora.data.batch import (
    MOST_POSITIONS,
    PACKED_POSITIONS,
    Batch,
    by_length,
    collate,
    epoch_steps,
    steps_per_epoch,
)
from mlx_lora.data.encode import Row
from mlx_lora.errors import ModelError, TrainingError
from mlx_lora.machine import allocation, device, limits
from mlx_lora.models.trunk.layers import layers_of, lowest_trainable
from mlx_lora.models.trunk.lean import lean
from mlx_lora.models.trunk.packing import packing_refused
from mlx_lora.models.trunk.recompute import recomputed
from mlx_lora.models.trunk.trunk import Trunk
from mlx_lora.models.trunk.verify import Verified, take_apart, verify
from mlx_lora.train import optim, prefix
from mlx_lora.train.budget.choose import Plan
from mlx_lora.train.checkpoint import Progress, gathered
from mlx_lora.train.distributed import Processes
from mlx_lora.train.events import Checkpoint, Evaluated, Event, Finished, Interrupted, Note, Saved, Step
from mlx_lora.train.objectives.likelihood import Arrays, Loss, as_arrays
from mlx_lora.train.saving import SaveClock
from mlx_lora.train.step import Pending, Stepper

MOST_SKIPPED = 3


def train(
    model: nn.Module,
    rows: Sequence[Row],
    valid: Sequence[Row],
    settings: Train,
    *,
    seed: int = 0,
    trunk: Trunk | None = None,
    packing: bool = False,
    scratch: Path | None = None,
    processes: Processes | None = None,
    plan: Plan | None = None,
    resume: Checkpoint | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Generator[Event, None, None]:
    """Train what is trainable in `model` on `rows`, evaluating on `valid`; see `events` for what is yielded.

    The same seed and rows give the same bytes, also when a run goes on from one of its checkpoints (`resume`). Three
    steps in a row that are not finite end the run, with what was learned before them. `scratch` is a folder for a file
    without a name, where a kept prefix doesn't fit memory. A `plan` says how to stay within a limit of memory; a step
    that takes more ends the run, saved, before the machine swaps. Raises TrainingError when there is nothing to train,
    or when what was asked for can't be had for this model.
    """
    if not tree_flatten(model.trainable_parameters()):
        raise TrainingError("nothing is trainable", hint="attach an adapter first")
    if not rows or not all(row.trained for row in (*rows, *valid)):
        raise TrainingError("there are no rows, or rows without a token to learn", hint="leave such rows out")
    model.eval()
    with ExitStack() as stack:
        stack.enter_context(allocation.memory_limits())
        run = _Run(trunk or take_apart(model), rows, valid, settings, seed, packing, processes or Processes(), plan)
        stack.callback(model.eval)
        if resume is not None:
            run.progress = Progress.read(resume.progress)
        with run.processes.agreed():
            notes = list(run.prepare(scratch, stack))
            if resume is not None:
                run.stepper.restore(resume.arrays)
        yield from notes
        yield from _loop(run, should_stop)


def _loop(run: _Run, should_stop: Callable[[], bool]) -> Iterator[Event]:
    settings, done = run.settings, run.progress
    stopped_by = "iters" if settings.iters else "epochs"

    # where it starts from; an evaluation that was interrupted is made up for
    if not done.step or (run.evaluates(done.step) and done.evaluated_at < done.step):
        yield from _evaluate(run, should_stop)
    with closing(ahead(run.batches())) as steps:
        for batches in steps:
            # a step in trouble is looked at before the next one
            if done.skipped_in_a_row:
                yield from run.collect()
            # leave early, with everything kept
            if reason := _reason_to_stop(run, should_stop):
                stopped_by = reason
                break
            # one optimizer step, and the figures of the one before
            yield from run.step(batches, stop=run.processes.size > 1 and should_stop())
            # evaluate once in a while, and at the end
            if run.evaluates(run.dispatched):
                yield from run.collect()
                yield from _evaluate(run, should_stop)
            # save, so that little is lost
            if run.saves():
                yield from run.collect()
                yield from run.save()
    yield from run.collect()
    if run.valid and run.evaluates(done.step) and done.evaluated_at < done.step and should_stop():
        stopped_by = "interrupted"  # in the last evaluation
    if done.step and (stopped_by in ("interrupted", "memory") or settings.schedule == "constant"):
        yield run.checkpoint()  # to go on from; with a constant rate also to train on for longer
    if stopped_by == "memory":
        yield Note(f"stopped, to keep the machine from swapping: {run.exceeded}")
    if stopped_by == "interrupted":
        yield Interrupted(done.step)
    if done.step:
        yield Saved(done.step, "last", run.stepper.adapter())
    yield run.finished(stopped_by)


def _reason_to_stop(run: _Run, should_stop: Callable[[], bool]) -> str | None:
    done = run.progress
    # one process stops at once; several agree on it with the sums of a step
    if run.stop_asked or (run.processes.size == 1 and should_stop()):
        return "interrupted"
    if run.exceeded:
        return "memory"
    if done.skipped_in_a_row >= MOST_SKIPPED:
        return "nonfinite"
    patience = run.settings.patience
    return "patience" if patience and done.evaluations_without_gain >= patience else None


def _evaluate(run: _Run, should_stop: Callable[[], bool]) -> Iterator[Event]:
    """One evaluation, unless there is nothing to evaluate on or it was interrupted on the way."""
    done = run.progress
    loss = run.evaluate(should_stop) if run.valid else None
    if loss is None:
        return
    # the untrained adapter is where it starts from, never the best: whoever stops early keeps what was learned
    best = done.step > 0 and math.isfinite(loss) and (done.best_loss is None or loss < done.best_loss)
    done.evaluations_without_gain = 0 if best or not done.step else done.evaluations_without_gain + 1
    done.valid_loss, done.evaluated_at = loss, done.step
    yield Evaluated(done.step, loss, best)
    if best:
        done.best_loss = loss
        yield Saved(done.step, "best", run.stepper.adapter())


class _Run:
    """One training run: its rows, its steps, and how far it is."""

    stepper: Stepper

    def __init__(
        self,
        trunk: Trunk,
        rows: Sequence[Row],
        valid: Sequence[Row],
        settings: Train,
        seed: int,
        packing: bool,
        processes: Processes,
        plan: Plan | None,
    ):
        self.trunk, self.model, self.settings, self.seed = trunk, trunk.model, settings, seed
        self.rows, self.valid = rows, valid
        self.packing, self.processes, self.plan, self.progress = packing, processes, plan, Progress()
        self.lengths = [len(row) for row in rows]
        self.per_epoch = steps_per_epoch(
            len(rows), batch_size=settings.batch_size, grad_accumulation=settings.grad_accumulation
        )
        self.steps = optim.total_steps(settings, self.per_epoch)
        self.rate = optim.schedule(settings, self.steps)
        self.prefix: prefix.Prefix | None = None
        self.cut_last = False
        self.stop_asked, self.exceeded, self.largest = False, "", 0
        self._pending: Pending | None = None

    def prepare(self, scratch: Path | None, stack: ExitStack) -> Iterator[Note]:
        """Decide how the model is run, undone by `stack`, and compile the step; says what isn't as one would expect."""
        if not self.trunk.apart:
            yield Note("the output head can't be taken apart from this model: it computes logits at every position")
        yield from self._choose()
        verified = self._verified(recompute=bool(self.progress.recomputes))
        yield from map(Note, verified.notes)
        # what stays of a cut last layer while the loss is computed is more than gradient checkpointing plans for
        self.cut_last = verified.columns and not verified.recompute
        layers, first = layers_of(self.model), lowest_trainable(self.model)
        stack.enter_context(lean(layers, without=verified.without))  # also what resets states where packed rows begin
        yield from self._keep_prefix(scratch, stack)
        if verified.recompute:
            stack.enter_context(recomputed(layers[first if isinstance(first, int) else 0 :]))
        loss = Loss(self.trunk, start=self.prefix.start if self.prefix else 0)
        self.stepper = Stepper(self.model, loss, self.settings, self.steps, self.seed, self.processes)
        mx.reset_peak_memory()
        self.dispatched = self.progress.step
        self._start = self._mark = time.perf_counter()
        self.clock = SaveClock(self.settings.save_every, self.processes)

    def _verified(self, *, recompute: bool) -> Verified:
        """What holds for this model. Raises TrainingError where it can't be trained, or not on packed rows."""
        try:
            verified = verify(self.trunk, recompute=recompute, columns=True)
        except ModelError as error:
            raise TrainingError(error.message) from error
        length = self._longest_line() if self.packing else 0
        if length and (reason := packing_refused(self.trunk, length=length, without=verified.without)):
            raise TrainingError(f"rows can't be packed for this model: {reason}", hint="set data.packing=false")
        return verified

    def _choose(self) -> Iterator[Note]:
        """How the plan wants it, unless the run has chosen before: layers computed again, smaller micro-batches."""
        done, plan = self.progress, self.plan
        if done.recomputes is None:
            done.recomputes = plan.recompute if plan else self.settings.grad_checkpoint == "on"
            # several processes would cut their evaluations differently
            done.most_positions = plan.most_positions if plan and self.processes.size == 1 else None
        if plan and done.recomputes and self.settings.grad_checkpoint == "auto":
            yield Note(f"gradient checkpointing is on, to stay within {ui.size(plan.limit_bytes)}")
        if done.most_positions and done.most_positions < MOST_POSITIONS:
            yield Note(f"micro-batches hold at most {done.most_positions} positions, to stay within the limit")

    def _keep_prefix(self, scratch: Path | None, stack: ExitStack) -> Iterator[Note]:
        """Keep what enters the first adapted layer where that saves work and is proven on the first batch."""
        choice, before = self.settings.cache_prefix, self.progress.keeps_prefix
        if choice == "off" or before is False or (choice == "auto" and self.steps <= self.per_epoch):
            return
        lengths = {"train": self.lengths, "valid": [len(row) for row in self.valid]}
        first = {row: lines for step in self._plan(0) for lines in step for line in lines for row in line}
        home = {"train": lambda row: self._collate(first[row]) if row in first else None}
        made = prefix.plan(self.trunk, lengths, scratch, home)
        if not isinstance(made, str):
            stack.callback(made.close)
            micro = next((micro for step in self._plan(0) for micro in step), None)
            if micro is not None and (reason := made.differs(self._collate(micro))):
                made.close()
                made = reason
        self.progress.keeps_prefix = isinstance(made, prefix.Prefix)
        if isinstance(made, prefix.Prefix):
            self.prefix = made
            yield Note(str(made))
        elif choice == "on" or before:
            raise TrainingError(f"train.cache_prefix can't be used: {made}", hint="train.cache_prefix=off")

    def _longest_line(self) -> int:
        """Positions that no packed line exceeds: those of a line, or of the longest rows of one step."""
        longest = sorted(length - 1 for length in self.lengths)
        in_a_step = sum(longest[-self.settings.batch_size * self.settings.grad_accumulation :])
        return min(max(PACKED_POSITIONS, longest[-1]), in_a_step)

    def _plan(self, epoch: int) -> list[list[list[list[int]]]]:
        return epoch_steps(
            self.lengths,
            batch_size=self.settings.batch_size,
            grad_accumulation=self.settings.grad_accumulation,
            seed=self.seed,
            epoch=epoch,
            packing=self.packing,
            share=self.processes.share,
            most=self.progress.most_positions,
        )

    def _collate(self, lines: list[list[int]]) -> Batch:
        return collate(self.rows, lines, packed=self.packing)

    def batches(self) -> Iterator[list[Batch]]:
        """The micro-batches of one optimizer step after another, from where the run is, as many as it has."""
        made = self.dispatched
        epoch, first = divmod(made, self.per_epoch)
        while made < self.steps:
            for step in self._plan(epoch)[first : first + self.steps - made]:
                yield [self._collate(lines) for lines in step]
                made += 1
            epoch, first = epoch + 1, 0

    def arrays(self, of: str, batch: Batch) -> Arrays:
        """A batch on the device, with its hidden states where a prefix is kept."""
        states = self.prefix.states(of, batch) if self.prefix else None
        return as_arrays(batch, states, batch.columns() if self.cut_last else None)

    def step(self, batches: list[Batch], *, stop: bool) -> Iterator[Step | Note]:
        """Dispatch one optimizer step; yields the one before it, now that the device has something to do."""
        tokens, save = sum(batch.trained for batch in batches), self.clock.asks()
        arrays = (self.arrays("train", batch) for batch in batches)
        pending = self.stepper.dispatch(arrays, tokens, stop=stop, save=save)
        yield from self.collect()
        self.dispatched += 1
        self._pending = pending
        if not device.on_gpu():  # where dispatching takes as long as the step
            yield from self.collect()
        self.progress.computed_tokens += sum(batch.inputs.size for batch in batches)
        self.largest = max([self.largest, *(batch.inputs.size for batch in batches)])
        self.progress.real_tokens += sum(batch.real for batch in batches)

    def collect(self) -> Iterator[Step | Note]:
        """Wait for the step on its way, if there is one, and count it."""
        for note, told in self.stepper.notes.items():
            if not told:
                self.stepper.notes[note] = True
                yield Note(note)
        if self._pending is None:
            return
        pending, self._pending, done = self._pending, None, self.progress
        rate = float(self.rate(mx.array(done.step - done.skipped)).item())
        loss, tokens, finite = float(pending.loss.item()), int(pending.tokens.item()), bool(pending.finite.item())
        began, self._mark = self._mark, time.perf_counter()
        allocation.hold_back()
        done.count(loss, tokens, finite=finite)
        self.stop_asked |= pending.stop.item() > 0
        self.clock.step_done(asked=pending.save.item() > 0)
        if self.plan and self.processes.size == 1:
            self.exceeded = limits.exceeded(self.plan.limit_bytes) or ""
        yield Step(
            step=done.step,
            steps=self.steps,
            loss=loss / tokens,
            learning_rate=rate,
            gradient_norm=float(pending.norm.item()),
            tokens=tokens,
            tokens_per_second=tokens / (self._mark - began),
            peak_memory=mx.get_peak_memory(),
            skipped=not finite,
        )

    def evaluate(self, should_stop: Callable[[], bool]) -> float | None:
        """Mean loss per token over all validation rows, always in the same batches; None when asked to stop."""
        total, tokens = mx.array(0.0), 0
        self.model.eval()  # also what makes states to keep
        share, most = self.processes.share, self.progress.most_positions
        for batch in by_length(self.valid, self.settings.batch_size, share, most):
            if self.processes.size == 1 and should_stop():
                return None
            total = total + self.stepper.evaluate(self.arrays("valid", batch))
            mx.eval(total)
            allocation.hold_back()
            tokens += batch.trained
        total, counted = self.processes.sum((total, mx.array(float(tokens))))
        self._mark = time.perf_counter()
        return float(total.item()) / float(counted.item())

    def evaluates(self, step: int) -> bool:
        """Whether there is an evaluation after `step` steps: once in a while, and at the end."""
        every = self.settings.eval_every
        return step == self.steps or bool(every and step % every == 0)

    def saves(self) -> bool:
        """Whether it is time for a checkpoint."""
        return self.dispatched < self.steps and self.clock.due(self.dispatched)

    def save(self) -> Iterator[Checkpoint]:
        """Yield a checkpoint and measure how long it takes to be written."""
        began = time.perf_counter()
        yield self.checkpoint()
        self.clock.saved(time.perf_counter() - began)

    def checkpoint(self) -> Checkpoint:
        """The run as it is, between two steps."""
        progress = {**self.progress.as_dict(), "seconds": self._seconds()}
        if self.exceeded:  # it has to go on in another way
            progress |= {"recomputes": None, "most_positions": None}
        return gathered(Checkpoint(self.progress.step, self.stepper.state(), progress), self.processes)

    def _seconds(self) -> float:
        return self.progress.seconds + time.perf_counter() - self._start

    def finished(self, stopped_by: str) -> Finished:
        done, seconds = self.progress, self._seconds()
        computed, real = self.processes.count(done.computed_tokens, done.real_tokens)
        return Finished(
            iters=done.step,
            epochs=round(done.step / self.per_epoch, 4),
            train_loss=done.train_loss,
            valid_loss=done.valid_loss if done.evaluated_at == done.step else None,
            best_valid_loss=done.best_loss,
            trained_tokens=done.trained_tokens,
            computed_tokens=computed,
            padding_fraction=1 - real / computed if computed else 0.0,
            seconds=seconds,
            tokens_per_second=done.trained_tokens / seconds,
            peak_memory_bytes=mx.get_peak_memory(),
            largest_micro_batch=self.largest,
            trainable_parameters=sum(array.size for array in self.stepper.adapter().values()),
            skipped_steps=done.skipped,
            stopped_by=stopped_by,
        )
