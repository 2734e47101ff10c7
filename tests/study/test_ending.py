"""What is said at the end of a run, from records like those that runs leave."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.config import Recipe
from mlx_lora.store.run import Evaluation, FinishedLine, RunRecord, Started, StepLine
from mlx_lora.study.ending import ending


def record(
    valid: dict[int, float],
    train: list[float] | None = None,
    *,
    steps: int = 40,
    epochs: float = 4.0,
    planned: int | None = None,
    stopped_by: str | None = "epochs",
    rows: int | None = 50,
    settings: dict[str, Any] | None = None,
    best: int | None = None,
) -> RunRecord:
    """`best` is the step whose adapter is kept: that of the lowest loss by default, 0 for none."""
    losses = train or [1.0] * steps
    finite = [step for step in valid if step and math.isfinite(valid[step])]
    best = best if best is not None else min(finite, key=lambda step: valid[step], default=0)
    finished = FinishedLine(iters=steps, epochs=epochs, stopped_by=stopped_by) if stopped_by else None
    return RunRecord(
        name="mine",
        path=Path("mine"),
        state="finished",
        recipe=Recipe.model_validate({"train": settings or {}}),
        first=Started(time="", mlx_lora="", rows=40, valid_rows=rows),
        steps=[
            StepLine(step=number, steps=planned or steps, loss=loss) for number, loss in enumerate(losses[:steps], 1)
        ],
        evaluations=[
            Evaluation(step=step, loss=loss if math.isfinite(loss) else None, best=0 < step == best)
            for step, loss in valid.items()
        ],
        finished=finished,
    )


def falling(end: float, *, to: float = 0.0, steps: int = 40) -> list[float]:
    """Losses that fall from 4 by a constant factor a step, to `end` above `to`."""
    return [to + (4 - to) * (end / (4 - to)) ** (step / steps) for step in range(1, steps + 1)]


CASES = {
    "falling": (
        record({0: 4.0, 40: 2.1}, falling(2.0)), "falling",
        "the validation loss fell from 4 to 2.1 and was still falling: ",
    ),
    "levelled": (
        record({0: 4.0, 10: 1.0, 20: 0.52, 30: 0.5, 40: 0.5}), "levelled",
        "the validation loss fell from 4 to 0.5 and has levelled off; it was lowest at step 30, whose adapter is kept",
    ),
    "best before the end": (
        record({0: 4.0, 10: 1.0, 20: 0.5, 30: 0.6, 40: 0.8}), "best_before_end",
        "the validation loss fell from 4 to 0.5 at step 20, then rose to 0.8: the adapter of step 20 is kept; "
        "train.epochs=2 would be enough",
    ),
    "no better, learned": (
        record({0: 2.0, 40: 2.2}, falling(0.2)), "no_better",
        "no better than the base: the validation loss is 2.2, and 2 without the adapter, while the training rows were "
        "learned: more rows, or fewer epochs, may help",
    ),
    "no better, diverged": (
        record({0: 2.0, 40: 9.0}, [2.0 + step for step in range(40)]), "no_better",
        "no better than the base: the validation loss is 9, and 2 without the adapter; the training loss rose as well: "
        "a lower train.learning_rate may help",
    ),
    "no better, nothing learned": (
        record({0: 2.0, 40: 2.0}), "no_better",
        "no better than the base: the validation loss is 2, and 2 without the adapter; little was learned: more epochs "
        "or a higher train.learning_rate may help",
    ),
    "too few": (
        record({0: 2.0, 40: 1.9}, rows=4), "too_few",
        "4 validation rows, and a loss of 2 before and 1.9 after: too few rows to say more; 20 or more would",
    ),
    "few, but clear": (
        record({0: 8.0, 10: 1.0, 20: 0.5, 30: 0.49, 40: 0.49}, rows=4), "levelled",
        "the validation loss fell from 8 to 0.49 and has levelled off; it was lowest at step 30, whose adapter is kept",
    ),
    "no validation rows": (
        record({}, rows=0), "unknown",
        "no validation loss says whether it helped: keep some rows aside in a valid.jsonl",
    ),
    "drift": (
        record({0: 4.0, 20: 1.0, 30: 0.7, 40: 0.5}, stopped_by="drift", best=20, settings={"max_drift": 0.1}),
        "drifted",
        "stopped because the model moved further from the base than train.max_drift allows; the validation loss was 4 "
        "before and 1 at step 20, whose adapter is kept; lower ones were further from the base than train.max_drift "
        "allows",
    ),
    "drift from the beginning": (
        record({0: 4.0, 20: 0.7, 40: 0.5}, stopped_by="drift", best=0, settings={"max_drift": 0.1}), "drifted",
        "stopped because the model moved further from the base than train.max_drift allows; no validation was within "
        "train.max_drift: the last adapter is kept, which is over it; a lower train.learning_rate or a smaller "
        "train.eval_every may help",
    ),
    "drift, and the loss rose": (
        record({0: 4.0, 20: 1.0, 40: 2.0}, stopped_by="drift", planned=80, settings={"max_drift": 0.1}),
        "best_before_end",
        "stopped because the model moved further from the base than train.max_drift allows; the validation loss fell "
        "from 4 to 1 at step 20, then rose to 2: the adapter of step 20 is kept; train.epochs=2 would be enough",
    ),
    "not a number": (
        record({0: 4.0, 10: 2.0, 20: 1.0, 30: 0.5, 40: math.nan}, falling(1.0), planned=80, stopped_by="nonfinite"),
        "unfinished",
        "stopped at step 40, where the loss was no number any more; the validation loss fell from 4 to 0.5 at step 30",
    ),
    "never a number": (
        record({0: 4.0, 40: math.nan}, planned=80, stopped_by="nonfinite"), "unknown",
        "stopped at step 40, where the loss was no number any more; the validation loss was no number: a lower "
        "train.learning_rate may help",
    ),
    "interrupted before a validation": (
        record({0: 4.0}, planned=80, stopped_by="interrupted"), "unknown",
        "stopped at step 40 of 80; the validation rows have not been looked at since the first step",
    ),
    "running": (
        record({0: 4.0, 20: 1.0, 40: 0.995}, planned=80, stopped_by=None), "unfinished",
        "so far, the validation loss fell from 4 to 0.995 at step 40",
    ),
    "patience while it fell": (
        record({0: 4.0, 10: 2.0, 20: 1.1, 30: 1.0, 40: 1.01}, falling(1.0), planned=80, stopped_by="patience"),
        "levelled",
        "stopped at step 40 of 80, when validation gained nothing more; the validation loss fell from 4 to 1.01 and "
        "has levelled off; it was lowest at step 30, whose adapter is kept",
    ),
    "patience": (
        record({0: 4.0, 20: 1.0, 40: 2.0}, planned=80, stopped_by="patience"), "best_before_end",
        "stopped at step 40 of 80, when validation gained nothing more; the validation loss fell from 4 to 1 at step "
        "20, then rose to 2: the adapter of step 20 is kept; train.epochs=2 would be enough",
    ),
    "interrupted": (
        record({0: 4.0, 20: 1.0}, falling(1.0), planned=80, stopped_by="interrupted"), "unfinished",
        "stopped at step 40 of 80; the validation loss fell from 4 to 1 at step 20",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_sentence_says_what_happened(case: str) -> None:
    made, kind, text = CASES[case]
    found = ending(made)
    assert found is not None and found.kind == kind
    assert found.text.startswith(text) if kind == "falling" else found.text == text


@pytest.mark.parametrize("rate", [0.5, 1.0, 2.0])
def test_the_epochs_that_it_proposes_bring_most_of_what_is_left(rate: float) -> None:
    """A loss that nears 0.5 exponentially, followed for four epochs: with those proposed it is within 5 % of it."""

    def loss(epochs: float) -> float:
        return 0.5 + 3.5 * math.exp(-rate * epochs)

    valid = {step: loss(step / 10) for step in range(0, 41, 5)}
    found = ending(record(valid))
    assert found is not None
    if (loss(3) - loss(4)) / loss(3) < 0.03:
        assert found.kind == "levelled" and loss(4) / 0.5 < 1.05
        return
    assert found.more_epochs is not None and f"train.epochs={4 + found.more_epochs}" in found.text
    assert loss(4 + found.more_epochs) / 0.5 < 1.05 < loss(4) / 0.5


def test_a_run_of_so_many_steps_is_told_steps() -> None:
    found = ending(record({0: 4.0, 40: 2.1}, falling(2.0), settings={"iters": 40}))
    assert found is not None and found.more_epochs is not None
    more = found.more_epochs * 10
    assert found.text.endswith(f"{more} more steps may lower it (train.iters={40 + more})")


def test_a_part_of_an_epoch_is_told_to_go_on_for_twice_as_long_at_most() -> None:
    """Where the recipe counts steps, an epoch may be many times the run."""
    found = ending(record({0: 4.0, 40: 0.2}, falling(0.1), epochs=0.1, settings={"iters": 40}))
    assert found is not None and found.text.endswith(": 60 more steps may lower it (train.iters=100)")


def test_a_run_without_a_step_has_no_ending() -> None:
    assert ending(record({0: 4.0}, steps=0, stopped_by=None)) is None


def test_a_record_of_an_older_version_has_an_ending() -> None:
    old = record({0: 4.0, 40: 1.0}).model_copy(update={"first": None, "recipe": None})
    found = ending(old)
    assert found is not None and found.kind == "levelled"
