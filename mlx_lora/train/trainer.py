"""The training loop: rows in, events out.

It knows nothing about screens or recipes: it is given a model with adapters attached, rows, and settings, and yields
events. While the device computes a step, a thread prepares the batches of the next ones and the events of the last one
are handled: a step's figures are read only when the step after it is on its way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import mlx.nn as nn

from mlx_lora.config import Train, number
from mlx_lora.data.prefetch import prefetch
from mlx_lora.data.rows import Row
from mlx_lora.machine import allocation
from mlx_lora.models.trunk.trunk import Trunk
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.train import preconditions
from mlx_lora.train.budget.choose import Plan
from mlx_lora.train.checkpoint import Progress
from mlx_lora.train.distributed import Processes
from mlx_lora.train.events import Checkpoint, Evaluated, Event, Interrupted, Note, Saved
from mlx_lora.train.session import Session

MOST_SKIPPED = 3
# Evaluations in a row over max_drift after which no later one is expected to be within it.
MOST_OVER = 2
NONE_WITHIN = (
    "no evaluation was within train.max_drift, so the adapter is the last one, which is over it: evaluate more often "
    "(train.eval_every), or learn more slowly (train.learning_rate)"
)


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
    when what was asked for can't be had for this model, when a row has a token that its embedding has no row for, and
    when its logits aren't finite before the first step.
    """
    preconditions.check_rows(model, rows, valid)
    model.eval()
    with ExitStack() as stack:
        stack.enter_context(allocation.memory_limits())
        trunk = trunk or take_apart(model)
        preconditions.check_model(trunk, (*rows, *valid))
        run = Session(trunk, rows, valid, settings, seed, packing, processes or Processes(), plan)
        stack.callback(model.eval)
        if resume is not None:
            run.progress = Progress.read(resume.progress)
        with run.processes.agreed():
            notes = list(run.prepare(scratch, stack))
            if resume is not None:
                run.stepper.restore(resume.arrays)
        yield from notes
        yield from _loop(run, should_stop)


def _loop(run: Session, should_stop: Callable[[], bool]) -> Iterator[Event]:
    settings, done = run.settings, run.progress
    stopped_by = "iters" if settings.iters else "epochs"

    # where it starts from; an evaluation that was interrupted is made up for
    if not done.step or (run.evaluates(done.step) and done.evaluated_at < done.step):
        yield from _evaluate(run, should_stop)
    with closing(prefetch(run.batches())) as steps:
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
    yield from map(Note, _notes(run, stopped_by))
    if stopped_by == "interrupted":
        yield Interrupted(done.step)
    if done.step:
        yield Saved(done.step, "last", run.stepper.adapter())
    yield run.finished(stopped_by)


def _notes(run: Session, stopped_by: str) -> Iterator[str]:
    """What is to be said at the end beside the figures."""
    if stopped_by == "memory":
        yield f"stopped, to keep the machine from swapping: {run.exceeded}"
    if stopped_by == "drift":
        yield f"stopped: {MOST_OVER} validations in a row were further from the base than train.max_drift allows"
    if run.settings.max_drift is not None and run.progress.evaluated_at and run.progress.best_loss is None:
        yield NONE_WITHIN


def _reason_to_stop(run: Session, should_stop: Callable[[], bool]) -> str | None:
    done = run.progress
    # one process stops at once; several agree on it with the sums of a step
    if run.stop_asked or (run.processes.size == 1 and should_stop()):
        return "interrupted"
    if run.exceeded:
        return "memory"
    if done.skipped_in_a_row >= MOST_SKIPPED:
        return "nonfinite"
    if done.evaluations_over >= MOST_OVER:
        return "drift"
    patience = number(run.settings.patience)
    return "patience" if patience and done.evaluations_without_gain >= patience else None


def _evaluate(run: Session, should_stop: Callable[[], bool]) -> Iterator[Event]:
    """One evaluation, unless there is nothing to evaluate on or it was interrupted on the way."""
    done = run.progress
    measured = run.evaluate(should_stop) if run.valid else None
    if measured is None:
        return
    loss, drift = measured
    most = run.settings.max_drift
    over = done.step > 0 and most is not None and drift is not None and not drift <= most  # NaN is over
    # the untrained adapter is where it starts from, never the best: whoever stops early keeps what was learned
    lower = math.isfinite(loss) and (done.best_loss is None or loss < done.best_loss)
    best = done.step > 0 and lower and not over
    done.evaluations_without_gain = 0 if best or not done.step else done.evaluations_without_gain + 1
    done.evaluations_over = done.evaluations_over + 1 if over else 0
    done.valid_loss, done.evaluated_at = loss, done.step
    yield Evaluated(done.step, loss, best, drift)
    if best:
        done.best_loss = loss
        yield Saved(done.step, "best", run.stepper.adapter())
