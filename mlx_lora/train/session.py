"""One training run: its rows, its compiled step, how the model is run, and how far it is.

Knows how one step, one evaluation and one checkpoint are made; when each is due is the trainer's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx

from mlx_lora import ui
from mlx_lora.config import Train, number
from mlx_lora.data.batch import (
    MOST_POSITIONS,
    PACKED_POSITIONS,
    Batch,
    by_length,
    collate,
    epoch_steps,
    steps_per_epoch,
)
from mlx_lora.data.rows import Row, lengths
from mlx_lora.errors import ModelError, TrainingError
from mlx_lora.machine import allocation, device, limits
from mlx_lora.models.trunk.layers import layers_of, lowest_trainable
from mlx_lora.models.trunk.lean import lean
from mlx_lora.models.trunk.packing import packing_refused
from mlx_lora.models.trunk.recompute import recomputed
from mlx_lora.models.trunk.trunk import Trunk
from mlx_lora.models.trunk.verify import Verified, verify
from mlx_lora.train import optim, prefix
from mlx_lora.train.budget.choose import Plan
from mlx_lora.train.checkpoint import Progress, gathered
from mlx_lora.train.distributed import Processes
from mlx_lora.train.events import Checkpoint, Finished, Note, Step
from mlx_lora.train.objectives.likelihood import Arrays, Loss, as_arrays
from mlx_lora.train.saving import SaveClock
from mlx_lora.train.step import Pending, Stepper


class Session:
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
        self.lengths: list[int] = lengths(rows).tolist()
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
        of_rows = {"train": self.lengths, "valid": lengths(self.valid).tolist()}
        first = {row: lines for step in self._plan(0) for lines in step for line in lines for row in line}
        home = {"train": lambda row: self._collate(first[row]) if row in first else None}
        room = self.plan.room_for_states if self.plan else None  # a file, where that is too little
        made = prefix.make(self.trunk, of_rows, scratch, home, memory=room)
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
            limit = None if self.plan.overruled else self.plan.limit_bytes
            self.exceeded = limits.exceeded(limit, beside=self._beside) or ""
        yield Step(
            step=done.step,
            steps=self.steps,
            loss=loss / tokens,
            learning_rate=rate,
            gradient_norm=float(pending.norm.item()),
            tokens=tokens,
            tokens_per_second=tokens / (self._mark - began),
            peak_memory=mx.get_peak_memory() + self._beside,
            skipped=not finite,
        )

    def evaluate(self, should_stop: Callable[[], bool]) -> tuple[float, float | None] | None:
        """Means per token over all validation rows, always in the same batches; None when asked to stop.

        They are the loss, and with `max_drift` set the KL from the base, in nats.
        """
        total, tokens = mx.zeros(1 if self.settings.max_drift is None else 2), 0
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
        loss, *drift = (float(value) / float(counted.item()) for value in total.tolist())
        return loss, max(drift[0], 0.0) if drift else None

    def evaluates(self, step: int) -> bool:
        """Whether there is an evaluation after `step` steps: once in a while, and at the end."""
        every = number(self.settings.eval_every)
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
            too_large = [self.progress.recomputes, self.progress.most_positions or MOST_POSITIONS]
            progress |= {"recomputes": None, "most_positions": None, "too_large": too_large}
        return gathered(Checkpoint(self.progress.step, self.stepper.state(), progress), self.processes)

    @property
    def _beside(self) -> int:
        """Bytes of kept states in memory, which MLX doesn't count."""
        return self.prefix.memory_bytes if self.prefix else 0

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
            peak_memory_bytes=mx.get_peak_memory() + self._beside,
            kept_states_bytes=self._beside,
            largest_micro_batch=self.largest,
            trainable_parameters=sum(array.size for array in self.stepper.adapter().values()),
            skipped_steps=done.skipped,
            stopped_by=stopped_by,
        )
