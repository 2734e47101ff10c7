"""The rule of a verdict: from measurements of a base and an adapter on the same rows to one word and one sentence.

    helped, hurt       the interval excludes zero and the test agrees (p < 0.05), on at least 10 rows
    no_difference      neither, and a difference worth having would have been seen
    too_few_rows       neither, and it might have been missed; or fewer than 10 rows

The word is about the task. What was lost elsewhere is in the same sentence, whatever the word is. No files, no model:
everything here follows from the numbers it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Literal

import numpy as np

from mlx_lora.study.behaviour import FAULTS, Change
from mlx_lora.study.drift import Moved
from mlx_lora.study.evaluate import Result, RowResult
from mlx_lora.study.statistics import Difference, of_losses, of_scores

Word = Literal["helped", "hurt", "no_difference", "too_few_rows"]
LOSS = "loss"
CHANCE = 0.05
# Fewer rows say nothing, whatever they show.
FEWEST_ROWS = 10
# A difference that is smaller is none, however certain it is: in a score's units, and in nats.
LEAST_DIFFERENCE = 0.01
# A difference worth having: in a score's units; in nats, or as a part of the base's loss where that is more.
WORTH_SCORE, WORTH_NATS, WORTH_PART = 0.2, 0.1, 0.1
# What the sentence calls a score whose name is no noun.
WORDS = {
    "exact": "exact match", "normalised": "match", "json": "JSON match", "pattern": "share that matches",
    "numbers": "share of right numbers", "sql": "share of right results", "scorer": "own score", LOSS: "loss",
}  # fmt: skip
# A row is fixed where its score comes from below this to at least this, broken the other way round; of rows without a
# score, where the loss per token has fallen or risen by so many nats.
HALF, FIXED_NATS = 0.5, 0.1
NO_INTERVAL = "one row has no interval"
# General text is forgotten where its loss has risen by this many nats: a tenth in perplexity.
FORGOT = 0.1


@dataclass(frozen=True)
class Measured:
    """The task's rows: the means of `metric` for both sides and their `difference`, tuned − base.

    `metric` is "loss" (nats per token, lower is better) or the name of a score (0 to 1, higher is better). With a
    score, `loss` is the difference of losses as a second opinion, and `losses` both means.
    """

    metric: str
    base: float
    tuned: float
    difference: Difference
    loss: Difference | None = None
    losses: tuple[float, float] | None = None

    @property
    def worth(self) -> float:
        """A difference worth having."""
        return WORTH_SCORE if self.metric != LOSS else max(WORTH_NATS, WORTH_PART * self.base)


@dataclass(frozen=True)
class Elsewhere:
    """What an adapter does besides its task: on `general` text, and how answers look; None and nothing if not measured.

    `changes` are those of answers to the task's prompts, `general_changes` of those to general ones.
    """

    general: Moved | None = None
    changes: Sequence[Change] = field(default_factory=tuple)
    general_changes: Sequence[Change] = field(default_factory=tuple)

    @property
    def forgot(self) -> bool:
        """Whether general text is worse by `FORGOT` nats or more, and surely worse, on rows enough to say so."""
        found = self.general.difference if self.general is not None else None
        return found is not None and found.estimate >= FORGOT and found.rows >= FEWEST_ROWS and surely(found)


@dataclass(frozen=True)
class Compared:
    """The same rows with the base and with an adapter, and what they say; `fixed` and `broken` are row numbers."""

    measured: Measured
    pairs: Sequence[tuple[RowResult, RowResult]]
    fixed: list[int]
    broken: list[int]


def compare(base: Result, tuned: Result, *, seed: int = 0) -> Compared:
    """Compare two results row by row: by their score where they have one, else by the loss.

    Raises ValueError where they share no row.
    """
    others = {row.number: row for row in tuned.each}
    pairs = [(row, others[row.number]) for row in base.each if row.number in others]
    tokens = np.array([row.tokens for row, _ in pairs], float)
    before, after = (np.array([pair[side].loss for pair in pairs], float) for side in (0, 1))
    loss = of_losses(before, after, tokens, seed=seed)
    means = (float(before.sum() / tokens.sum()), float(after.sum() / tokens.sum()))
    scored = [pair for pair in pairs if pair[0].score is not None and pair[1].score is not None]
    if not scored:
        steps = {row.number: (row.loss - other.loss) / max(row.tokens, 1) for row, other in pairs}
        return Compared(
            Measured(LOSS, *means, loss), pairs,
            [number for number, fell in steps.items() if fell >= FIXED_NATS],
            [number for number, fell in steps.items() if -fell >= FIXED_NATS],
        )  # fmt: skip
    before, after = (np.array([pair[side].score for pair in scored], float) for side in (0, 1))
    numbers = np.array([row.number for row, _ in scored])
    measured = Measured(
        str(base.score_name), float(before.mean()), float(after.mean()), of_scores(before, after, seed=seed),
        loss, means,
    )  # fmt: skip
    fixed, broken = numbers[(before < HALF) & (after >= HALF)], numbers[(before >= HALF) & (after < HALF)]
    return Compared(measured, pairs, fixed.tolist(), broken.tolist())


def judge(measured: Measured, elsewhere: Elsewhere, *, learned: bool = False) -> tuple[Word, str]:
    """The word and the sentence. The sentence has numbers and the metric's name, never text of a row.

    `learned` says that the adapter was trained on these rows.
    """
    word = word_of(measured)
    return word, f"{_task(word, measured, learned)}{_second_opinion(word, measured)}{_lost(word, elsewhere)}"


def word_of(measured: Measured) -> Word:
    """The word alone, from the task's rows."""
    found = measured.difference
    low, high = found.interval
    if found.rows < FEWEST_ROWS:
        return "too_few_rows"
    if surely(found) and abs(found.estimate) >= LEAST_DIFFERENCE:
        return "helped" if (low > 0) == (measured.metric != LOSS) else "hurt"
    if found.detectable <= measured.worth or surely(found):
        return "no_difference"
    return "too_few_rows"


def surely(found: Difference) -> bool:
    """Whether a difference is more than chance: zero is outside its interval, and the test agrees."""
    low, high = found.interval
    return found.p_value < CHANCE and (low > 0 or high < 0)


def rows_needed(measured: Measured) -> int:
    """About how many rows would show a difference worth having, four times in five."""
    found = measured.difference
    needed = ceil(found.rows * (found.detectable / measured.worth) ** 2)
    return max(FEWEST_ROWS, -(-needed // 10) * 10)


def _task(word: Word, measured: Measured, learned: bool) -> str:
    found, metric = measured.difference, WORDS.get(measured.metric, measured.metric)
    low, high = found.interval
    numbers = f"{metric} {measured.base:.2f} without the adapter, {measured.tuned:.2f} with it, on {_rows(found.rows)}"
    if learned:
        numbers += " that it was trained on, which says nothing about new ones"
    interval = f"95 % interval of the difference {low:+.2f} to {high:+.2f}" if found.rows > 1 else NO_INTERVAL
    if word == "helped":
        return f"helped: {numbers} ({interval})"
    if word == "hurt":
        return f"hurt: {numbers} ({interval})"
    if word == "no_difference":
        return f"no difference: {numbers} ({interval})"
    more = f"about {rows_needed(measured)} rows would show a difference of {measured.worth:.2g}"
    if found.detectable <= measured.worth:
        more = f"fewer than {FEWEST_ROWS} rows are not judged"
    return f"too few rows to say: {numbers} ({interval}; {more})"


def _second_opinion(word: Word, measured: Measured) -> str:
    """What the loss says where it adds something: it moves before a score does, or in the other direction."""
    if measured.loss is None or measured.losses is None or not surely(measured.loss):
        return ""
    fell = measured.loss.estimate < 0
    if abs(measured.loss.estimate) < LEAST_DIFFERENCE or (word == "helped" and fell) or (word == "hurt" and not fell):
        return ""
    base, tuned = measured.losses
    return f", while its loss {'fell' if fell else 'rose'} from {base:.2f} to {tuned:.2f} nats"


def _lost(word: Word, elsewhere: Elsewhere) -> str:
    """The rest of the sentence: general text first, then how answers look."""
    faults = [
        f"{FAULTS[change.what][1]} {where} ({change.base:.0%} before, {change.tuned:.0%} now)"
        for where, changes in (("on the task", elsewhere.changes), ("elsewhere", elsewhere.general_changes))
        for change in changes
        if change.what in FAULTS and change.worth_saying
    ]
    lengths = [
        f"takes {_tokens(change.tuned)} to answer a general question, the base {_tokens(change.base)}"
        for change in elsewhere.general_changes
        if change.what == "length" and change.worth_saying
    ]
    looks = faults + lengths
    shown = f"; it {', '.join(looks[:-1])}{' and ' if looks[:-1] else ''}{looks[-1]}" if looks else ""
    return _general(word, elsewhere) + shown


def _rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"


def _tokens(mean: float) -> str:
    return f"{mean:.0f} token{'' if round(mean) == 1 else 's'}"


def _general(word: Word, elsewhere: Elsewhere) -> str:
    moved = elsewhere.general
    if moved is None:
        return "; what it lost elsewhere was not measured"
    found, high = moved.difference, moved.difference.interval[1]
    numbers = f"loss {moved.loss_base:.2f} before, {moved.loss_tuned:.2f} now, KL {moved.kl:.2f} nats a token"
    if elsewhere.forgot:
        return f", {'but' if word == 'helped' else 'and'} it forgot general text ({numbers})"
    if found.estimate >= FORGOT:
        return f"; general text may be worse ({numbers}), too few rows to say"
    if found.rows < FEWEST_ROWS or high >= FORGOT:
        return f"; general text is no worse as far as {_rows(found.rows)} can say ({numbers})"
    if surely(found) and found.estimate <= -FORGOT:
        return f"; general text got better{' too' if word == 'helped' else ''} ({numbers})"
    if surely(found) and found.estimate >= LEAST_DIFFERENCE:
        return f"; general text is a little worse ({numbers})"
    return f"; general text is no worse ({numbers})"
