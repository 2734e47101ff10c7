"""What a run's record says about how it went, in one plain sentence, with what to do next.

The record has training losses and, where there are validation rows, validation losses from step 0 (the base without
the adapter) on. Whether a run was still falling is judged by its last two quarters; how much longer it would go on
falling, by supposing that each further quarter gains as much less as the last one gained less than the one before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mlx_lora.store.run import RunRecord
from mlx_lora.study.statistics import LEAST_ROWS

Kind = Literal["falling", "levelled", "unfinished", "best_before_end", "drifted", "no_better", "too_few", "unknown"]
# What ends a run that has all its steps, or needs no more.
ALL_STEPS, NO_MORE = ("epochs", "iters"), ("patience", "drift")
# A last quarter that lowered the loss by more than this share was still falling; one of less has levelled off.
STILL, LEVEL = 0.03, 0.01
# Quarters that more training is proposed for, at most: the run again, twice.
MOST_QUARTERS = 8
# Fewer validation rows than LEAST_ROWS can't tell a difference of less than this share of the base's loss.
CLEAR = 0.2
# An adapter that is better than the base by less than this share is no better; a loss that rises by less hasn't risen.
NO_GAIN, NO_RISE = 0.002, 0.02

Points = Sequence[tuple[int, float]]  # (step, loss), by step


@dataclass(frozen=True)
class Ending:
    """How a run went: a kind for programs, a sentence for people. `more_epochs` is what to try where it was falling."""

    kind: Kind
    text: str
    more_epochs: int | None = None


def ending(record: RunRecord) -> Ending | None:
    """The ending of a run as far as its record goes; None of one that took no step."""
    if not record.step:
        return None
    measured = [(line.step, line.loss) for line in record.evaluations if line.loss is not None]
    losses = [(line.step, line.loss) for line in record.steps if line.loss is not None]
    rows = record.first.valid_rows if record.first else None
    found = _judged(dict(measured), losses, rows, record)
    return Ending(found.kind, _stopped(record) + found.text, found.more_epochs)


def _judged(measured: dict[int, float], losses: Points, rows: int | None, record: RunRecord) -> Ending:
    after = {step: loss for step, loss in measured.items() if step}
    base = measured.get(0)
    more = _more_quarters(sorted(measured.items()), losses, record)
    if not after:
        return _without_validation(losses, more, rows, record)
    last = max(after)
    kept = record.kept.step if record.kept else last
    if record.recipe and record.recipe.train.max_drift is not None and (drifted := _drifted(base, after, record)):
        return drifted
    if base is not None and rows is not None and rows < LEAST_ROWS and abs(base - after[kept]) < CLEAR * base:
        of = f"{rows} validation row{'s' if rows != 1 else ''}"
        text = f"{of}, and a loss of {_loss(base)} before and {_loss(after[kept])} after: too few rows to say more"
        return Ending("too_few", f"{text}; {LEAST_ROWS} or more would")
    if base is not None and after[kept] >= base * (1 - NO_GAIN):
        return _no_better(base, after[kept], losses)
    fell = f"the validation loss fell from {_loss(base)} " if base is not None else "the validation loss came "
    if after[last] > after[kept] * (1 + NO_RISE):
        epochs = _epochs(record, kept)
        enough = f"; train.epochs={epochs} would be enough" if epochs and epochs < (_epochs(record, last) or 0) else ""
        text = f"{fell}to {_loss(after[kept])} at step {kept}, then rose to {_loss(after[last])}"
        return Ending("best_before_end", f"{text}: the adapter of step {kept} is kept{enough}")
    if record.stopped_by not in (*ALL_STEPS, *NO_MORE):
        return Ending("unfinished", f"{fell}to {_loss(after[kept])} at step {kept}")
    text = f"{fell}to {_loss(after[last])}"
    if more:
        return _falling("falling", f"{text} and was", more, record)
    where = f"; it was lowest at step {kept}, whose adapter is kept" if kept < last else ""
    return Ending("levelled", f"{text} and has levelled off{where}")


def _drifted(base: float | None, after: dict[int, float], record: RunRecord) -> Ending | None:
    """Where train.max_drift has decided which adapter is kept, and not the loss alone."""
    if record.kept is None:
        text = "no validation was within train.max_drift: the last adapter is kept, which is over it"
        return Ending("drifted", f"{text}; a lower train.learning_rate or a smaller train.eval_every may help")
    loss = after[record.kept.step]
    if loss <= min(after.values()):
        return None
    before = f"{_loss(base)} before and " if base is not None else ""
    text = f"the validation loss was {before}{_loss(loss)} at step {record.kept.step}, whose adapter is kept"
    return Ending("drifted", f"{text}; lower ones were further from the base than train.max_drift allows")


def _without_validation(losses: Points, more: int | None, rows: int | None, record: RunRecord) -> Ending:
    """Training loss alone can't say whether new rows are answered better."""
    text = "no validation loss says whether it helped: keep some rows aside in a valid.jsonl"
    if rows and any(line.step for line in record.evaluations):
        text = "the validation loss was no number: a lower train.learning_rate may help"
    elif rows:
        text = "the validation rows have not been looked at since the first step"
    if more:
        return _falling("unknown", f"{text}; the training loss was", more, record)
    return Ending("unknown", text)


def _no_better(base: float, best: float, losses: Points) -> Ending:
    """The adapter answers new rows no better than the base does; what to do depends on the training rows."""
    text = f"no better than the base: the validation loss is {_loss(best)}, and {_loss(base)} without the adapter"
    first, *_, end = _quarters(losses) if len(losses) >= 4 else [0.0, 0.0, 0.0, 0.0]
    if end > first:
        return Ending("no_better", f"{text}; the training loss rose as well: a lower train.learning_rate may help")
    if end < first * (1 - CLEAR):
        return Ending(
            "no_better", f"{text}, while the training rows were learned: more rows, or fewer epochs, may help"
        )
    return Ending("no_better", f"{text}; little was learned: more epochs or a higher train.learning_rate may help")


def _more_quarters(measured: Points, losses: Points, record: RunRecord) -> int | None:
    """Quarters of itself that a run still falling at its end might go on for.

    None where it has levelled off, was stopped, or can't be told.
    """
    if record.stopped_by not in ALL_STEPS:
        return None
    if len(measured) >= 5:
        steps = [round(record.step * part) for part in (0.5, 0.75, 1.0)]
        middle, late, end = (_at(measured, step) for step in steps)
    elif len(losses) >= 8:
        _, middle, late, end = _quarters(losses)
    else:
        return None
    gain, before = late - end, middle - late
    if end <= 0 or gain <= STILL * late:
        return None
    ratio = min(max(gain / before, 0.1), 0.9) if before > 0 else 0.9
    return min(math.ceil(math.log(LEVEL * end / gain, ratio)) if gain > LEVEL * end else 1, MOST_QUARTERS)


def _quarters(points: Points) -> list[float]:
    """Mean loss of each quarter of at least four points."""
    cuts = [len(points) * part // 4 for part in range(5)]
    parts = [points[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
    return [sum(loss for _, loss in part) / len(part) for part in parts]


def _at(points: Points, step: int) -> float:
    """The loss at a step, on the line between the measured ones beside it."""
    below = max((point for point in points if point[0] <= step), default=points[0])
    above = min((point for point in points if point[0] >= step), default=points[-1])
    share = (step - below[0]) / (above[0] - below[0]) if above[0] > below[0] else 0.0
    return below[1] + share * (above[1] - below[1])


def _epochs(record: RunRecord, step: int) -> int | None:
    """The whole epochs that `step` steps take."""
    epochs = record.finished.epochs if record.finished else 0.0
    return math.ceil(round(epochs * step / record.step, 3)) if epochs else None


def _falling(kind: Kind, text: str, quarters: int, record: RunRecord) -> Ending:
    """What to try: epochs, or steps where the recipe counts those."""
    done = record.finished.epochs if record.finished else 0.0
    more = max(1, math.ceil(quarters * done / 4))
    if record.recipe and record.recipe.train.iters:
        steps = math.ceil(quarters * record.step / 4)
        longer = f"{steps} more step{'s' if steps > 1 else ''} may lower it (train.iters={record.step + steps})"
    else:
        longer = f"{more} more epoch{'s' if more > 1 else ''} may lower it (train.epochs={math.ceil(done) + more})"
    return Ending(kind, f"{text} still falling: {longer}", more)


def _loss(value: float) -> str:
    return f"{value:.3g}"


def _stopped(record: RunRecord) -> str:
    """What ended a run before its time, in front of the sentence."""
    reasons = {
        "interrupted": f"stopped at step {record.step} of {record.planned_steps}; ",
        "memory": f"stopped at step {record.step} of {record.planned_steps}, for lack of memory; ",
        "nonfinite": f"stopped at step {record.step}, where the loss was no number any more; ",
        "drift": "stopped because the model moved further from the base than train.max_drift allows; ",
        "patience": f"stopped at step {record.step} of {record.planned_steps}, when validation gained nothing more; ",
    }
    return reasons.get(record.stopped_by or "", "") if record.finished else "so far, "
