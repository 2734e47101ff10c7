"""The rule: which numbers make which word, and what the sentence says of what was lost elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlx_lora.study.behaviour import Change
from mlx_lora.study.drift import Moved
from mlx_lora.study.evaluate import Result, RowResult
from mlx_lora.study.statistics import Difference
from mlx_lora.study.verdict import Elsewhere, Measured, compare, judge, rows_needed, word_of


def difference(estimate: float, half: float, *, p: float = 0.001, rows: int = 100) -> Difference:
    """A difference whose interval is as wide to both sides; what it could see follows from the width."""
    return Difference(estimate, (estimate - half, estimate + half), p, "McNemar", half * 1.43, rows)


def score(estimate: float, half: float, **more: Any) -> Measured:
    return Measured("accuracy", 0.4, 0.4 + estimate, difference(estimate, half, **more))


def loss(estimate: float, half: float, *, base: float = 2.0, **more: Any) -> Measured:
    return Measured("loss", base, base + estimate, difference(estimate, half, **more))


TABLE = [
    # a score is better where it is higher
    (score(+0.30, 0.10), "helped"),
    (score(-0.30, 0.10), "hurt"),
    (score(+0.05, 0.10, p=0.4), "no_difference"),
    (score(+0.00, 0.10, p=1.0), "no_difference"),
    (score(+0.15, 0.20, p=0.2), "too_few_rows"),
    # a loss is better where it is lower
    (loss(-0.50, 0.10), "helped"),
    (loss(+0.50, 0.10), "hurt"),
    (loss(-0.02, 0.05, p=0.5), "no_difference"),
    (loss(-0.20, 0.30, p=0.3), "too_few_rows"),
    # what is worth having grows with a large loss
    (loss(-0.20, 0.60, p=0.5, base=11.0), "no_difference"),
    # an interval without zero is not enough where the exact test sees chance, and few rows never are
    (score(+0.30, 0.25, p=0.07), "too_few_rows"),
    (score(+0.90, 0.05, rows=9), "too_few_rows"),
    (score(+0.90, 0.05, rows=10), "helped"),
    # sure, and too small to matter
    (score(+0.005, 0.004), "no_difference"),
    (loss(-0.005, 0.004), "no_difference"),
]


@pytest.mark.parametrize(("measured", "word"), TABLE)
def test_the_rule(measured: Measured, word: str) -> None:
    assert word_of(measured) == word
    found, sentence = judge(measured, Elsewhere())
    assert found == word and sentence.startswith(word.replace("_", " "))
    assert (
        f"on {measured.difference.rows} rows" in sentence
        and "95 % interval" in sentence
        and "was not measured" in sentence
    )


def moved(estimate: float, half: float, base: float = 2.0, **more: Any) -> Moved:
    return Moved(0.4, base, base + estimate, difference(estimate, half, **more))


def test_what_was_forgotten_is_in_the_same_sentence() -> None:
    helped = score(0.3, 0.1)
    word, sentence = judge(helped, Elsewhere(moved(0.8, 0.2)))
    assert word == "helped", "the word is about the task"
    assert "but it forgot general text (loss 2.00 before, 2.80 now, KL 0.40 nats a token)" in sentence
    for general, said in (
        (moved(0.02, 0.03, p=0.3), "general text is no worse (loss"),
        (moved(0.02, 0.01), "general text is a little worse"),
        (moved(0.02, 0.2, p=0.8), "general text is no worse as far as 100 rows can say"),
        (moved(-0.1, 0.01, rows=1), "general text is no worse as far as 1 row can say"),
        (moved(0.8, 0.0, p=1.0, rows=1), "general text may be worse"),  # one row's interval has no width
        (moved(0.8, 0.2, p=0.07), "general text may be worse"),
        (moved(0.3, 0.5), "general text may be worse"),
        (moved(-0.3, 0.1), "general text got better too"),
    ):
        assert said in judge(helped, Elsewhere(general))[1] and "forgot" not in judge(helped, Elsewhere(general))[1]
    assert "got better (loss" in judge(score(-0.3, 0.1), Elsewhere(moved(-0.3, 0.1)))[1]
    assert "and it forgot general text" in judge(score(-0.3, 0.1), Elsewhere(moved(0.8, 0.2)))[1]


def test_rows_that_were_learned_are_said_to_be() -> None:
    word, sentence = judge(score(0.3, 0.1), Elsewhere(), learned=True)
    assert (
        word == "helped" and "on 100 rows that it was trained on, which says nothing about new ones (95 %" in sentence
    )


def test_how_answers_look_is_said_where_it_got_worse() -> None:
    refuses = Change("refused", 0.0, 0.3, 0.001)
    chance = Change("loops", 0.0, 0.1, 0.3)
    better = Change("unfinished", 0.9, 0.0, 0.001)
    shorter = Change("length", 80.0, 1.0, 0.001)
    sentence = judge(score(0.3, 0.1), Elsewhere(moved(0, 0.01), [refuses, chance], [better, shorter]))[1]
    assert sentence.endswith(
        "; it refuses more often on the task (0% before, 30% now) and takes 1 token to answer a general question, "
        "the base 80 tokens"
    )


def test_the_loss_is_a_second_opinion() -> None:
    fell = difference(-3.4, 0.2)
    nothing = Measured("exact", 0.0, 0.0, difference(0, 0.1, p=1.0), fell, (11.5, 8.1))
    assert ", while its loss fell from 11.50 to 8.10 nats" in judge(nothing, Elsewhere())[1]
    assert "exact match 0.00 without the adapter" in judge(nothing, Elsewhere())[1]
    agreed = Measured("exact", 0.1, 0.6, difference(0.5, 0.1), fell, (11.5, 8.1))
    assert "loss fell" not in judge(agreed, Elsewhere())[1]
    against = Measured("exact", 0.1, 0.6, difference(0.5, 0.1), difference(0.4, 0.1), (1.5, 1.9))
    assert "while its loss rose from 1.50 to 1.90 nats" in judge(against, Elsewhere())[1]


def test_too_few_rows_say_how_many_would_do() -> None:
    few = score(0.1, 0.28, p=0.5, rows=25)  # what could be seen is 0.4, twice what is worth having: four times the rows
    assert rows_needed(few) == pytest.approx(100, abs=10)
    assert f"about {rows_needed(few)} rows would show a difference of 0.2" in judge(few, Elsewhere())[1]
    one = judge(score(0.3, 0.0, rows=1), Elsewhere())[1]
    assert "on 1 row (one row has no interval; fewer than 10 rows are not judged)" in one
    assert "fewer than 10 rows are not judged" in judge(score(0.9, 0.05, rows=6), Elsewhere())[1]


def results(
    scores: list[tuple[float | None, float | None]], losses: list[tuple[float, float]]
) -> tuple[Result, Result]:
    sides = []
    for side in (0, 1):
        each = tuple(
            RowResult(10 + place, loss[side], 4, "said", "wanted", pair[side])
            for place, (pair, loss) in enumerate(zip(scores, losses, strict=True))
        )
        name = None if scores[0][0] is None else "accuracy"
        sides.append(Result(None, 0.0, 1.0, 4 * len(each), len(each), score_name=name, each=each))
    return sides[0], sides[1]


def test_rows_are_compared_by_their_numbers() -> None:
    base, tuned = results([(0, 1), (1, 0), (0, 0), (1, 1), (0.2, 0.6)], [(8, 4), (4, 8), (4, 4), (4, 4), (4, 2)])
    found = compare(base, Result(None, 0.0, 1.0, 0, 0, each=tuned.each[::-1][:-1]))  # other order, row 10 left out
    assert (found.fixed, found.broken) == ([14], [11]) and found.measured.difference.rows == 4
    assert found.measured.base == pytest.approx(0.55) and found.measured.tuned == pytest.approx(0.4)
    assert found.measured.losses == pytest.approx((1.0, 1.125))


def test_rows_without_a_score_are_compared_by_their_loss() -> None:
    base, tuned = results([(None, None)] * 3, [(8.0, 4.0), (4.0, 8.0), (4.0, 4.1)])
    found = compare(base, tuned)
    assert found.measured.metric == "loss" and (found.fixed, found.broken) == ([10], [11])
    assert found.measured.difference.estimate == pytest.approx(np.mean([-4, 4, 0.1]) / 4)
