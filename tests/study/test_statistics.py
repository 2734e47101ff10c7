"""Intervals hold the truth as often as they say, tests are exact, and both agree with what is computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import comb

import numpy as np
import pytest

from mlx_lora.study import statistics
from mlx_lora.study.statistics import bootstrap_t, mcnemar, of_losses, of_scores, paired_shares, sign_flip

Generator = np.random.Generator
# Student's 97.5 % quantile at 199 degrees of freedom.
STUDENT_199 = 1.97196


def test_the_interval_of_normal_differences_is_students() -> None:
    values = np.random.default_rng(0).normal(0.3, 1, 200)
    low, high = bootstrap_t(values, np.ones(200), drawings=20_000)
    half = STUDENT_199 * values.std(ddof=1) / np.sqrt(200)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_a_row_counts_with_its_tokens() -> None:
    tokens = np.array([1.0, 3.0, 10.0, 6.0] * 10)
    before, after = 2.0 * tokens, 1.5 * tokens + np.tile([0.1, -0.1, 0.2, -0.2], 10)
    found = of_losses(before, after, tokens)
    assert found.estimate == pytest.approx((after.sum() - before.sum()) / tokens.sum())
    assert found.interval[0] < found.estimate < found.interval[1] < -0.4
    # a row of no tokens says nothing, and rows that are cut in two say the same mean
    padded = of_losses(np.append(before, 0), np.append(after, 0), np.append(tokens, 0))
    assert padded == found and found.rows == 40


def test_shares_of_paired_rows_by_hand() -> None:
    # 14 fixed and 3 broken of 40: (15 − 4) / 42 ± 1.96 · √((15/42 + 4/42 − (11/42)²) / 42)
    gained, lost = 15 / 42, 4 / 42
    half = 1.959964 * np.sqrt((gained + lost - (gained - lost) ** 2) / 42)
    assert paired_shares(14, 3, 40) == pytest.approx((11 / 42 - half, 11 / 42 + half), rel=1e-6)
    low, high = paired_shares(0, 0, 20)
    assert low == -high and 0.1 < high < 0.15


@pytest.mark.parametrize(("fixed", "broken"), [(0, 0), (5, 0), (0, 6), (9, 2), (7, 7), (40, 21)])
def test_mcnemar_is_the_binomial_test_of_rows_that_changed(fixed: int, broken: int) -> None:
    count = fixed + broken
    chances = [comb(count, k) / 2**count for k in range(count + 1)]
    expected = sum(chance for chance in chances if chance <= chances[fixed] * (1 + 1e-12))
    assert mcnemar(fixed, broken) == pytest.approx(min(expected, 1.0))


def test_sign_flips_are_all_looked_at_where_rows_are_few() -> None:
    values = np.array([0.4, 0.1, -0.2, 0.7, 0.05, 0.3])
    sums = [abs(np.dot(signs, values)) for signs in product((1, -1), repeat=6)]
    assert sign_flip(values) == pytest.approx(np.mean([value >= values.sum() - 1e-12 for value in sums]))
    assert sign_flip(np.append(values, [0, 0, 0])) == sign_flip(values)
    assert sign_flip(np.zeros(9)) == 1.0


def test_drawn_sign_flips_agree_with_all_of_them() -> None:
    values = np.random.default_rng(3).normal(0.5, 1, 14)
    exact = sign_flip(values)
    longer = np.append(values, [1e-6, -1e-6])  # too many to look at all
    assert sign_flip(longer, drawings=40_000) == pytest.approx(exact, abs=0.01) and 0 < exact < 0.5


def test_scores_of_right_and_wrong_are_counted_and_others_are_drawn() -> None:
    before, after = np.array([0.0, 0, 0, 1] * 10), np.array([1.0, 1, 0, 0] * 10)
    found = of_scores(before, after)
    assert (found.test, found.estimate) == ("McNemar", pytest.approx(0.25))
    assert found.interval == paired_shares(20, 10, 40) and found.p_value == mcnemar(20, 10)
    graded = of_scores(before * 0.9, after * 0.9)
    assert graded.test == "permutation" and graded.interval[0] < graded.estimate < graded.interval[1]
    same = of_scores(before * 0.9, before * 0.9)
    assert same.p_value == 1.0 and same.interval == paired_shares(0, 0, 40), "no row changed: still not certain"


def test_what_could_be_seen_is_seen_four_times_in_five() -> None:
    """The detectable difference of a sample, put into others like it, is found in about 80 of 100."""
    draw = np.random.default_rng(5)
    size = np.mean([of_scores(np.zeros(60), draw.normal(0, 1, 60)).detectable for _ in range(10)])
    found = [of_scores(np.zeros(60), draw.normal(size, 1, 60)).interval[0] > 0 for _ in range(150)]
    assert 0.7 < np.mean(found) < 0.9


def test_many_rows_are_drawn_in_parts() -> None:
    draw = np.random.default_rng(2)
    values, tokens = draw.normal(1, 1, 3000), draw.integers(1, 9, 3000).astype(float)
    low, high = bootstrap_t(values * tokens, tokens)
    rest = values * tokens - (values * tokens).sum() / tokens.sum() * tokens
    error = np.sqrt((rest**2).sum()) / tokens.sum()
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.08)


def test_no_rows_are_refused() -> None:
    for call in (lambda: of_scores([], []), lambda: of_losses([1.0], [1.0], [0.0])):
        with pytest.raises(ValueError, match="no rows"):
            call()


def normal(draw: Generator, rows: int) -> tuple[np.ndarray, np.ndarray, float]:
    return np.zeros(rows), draw.normal(0.3, 1, rows), 0.3


def exponential(draw: Generator, rows: int) -> tuple[np.ndarray, np.ndarray, float]:
    return np.zeros(rows), draw.exponential(1, rows), 1.0


def graded(draw: Generator, rows: int) -> tuple[np.ndarray, np.ndarray, float]:
    return draw.beta(0.3, 1.2, rows), draw.beta(0.5, 0.5, rows), 0.3


def ties(draw: Generator, rows: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Half of the rows don't change at all."""
    before = draw.beta(0.5, 0.5, rows)
    return before, np.where(draw.random(rows) < 0.5, before, draw.beta(2, 2, rows)), 0.0


def binary(fixed: float, broken: float) -> Callable[[Generator, int], tuple[np.ndarray, np.ndarray, float]]:
    def draw_rows(draw: Generator, rows: int) -> tuple[np.ndarray, np.ndarray, float]:
        kind = draw.random(rows)
        before = (kind < broken) | (kind > 0.9)
        after = ((kind >= broken) & (kind < broken + fixed)) | (kind > 0.9)
        return before.astype(float), after.astype(float), fixed - broken

    return draw_rows


SAMPLES = {
    "normal": normal, "exponential": exponential, "graded": graded, "ties": ties,
    "0/1, many fixed": binary(0.5, 0.05), "0/1, as many broken": binary(0.25, 0.25), "0/1, few": binary(0.15, 0.05),
}  # fmt: skip
TIMES = 1000


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the permutation test, which takes most of the time and has no part in the interval."""
    monkeypatch.setattr(statistics, "sign_flip", lambda differences, **settings: 1.0)


@pytest.mark.real
@pytest.mark.parametrize("rows", [20, 50, 200])
@pytest.mark.parametrize("name", SAMPLES)
def test_intervals_of_scores_hold_the_truth(name: str, rows: int, untested: None) -> None:
    draw = np.random.default_rng([rows, len(name)])
    held = 0
    for _ in range(TIMES):
        before, after, truth = SAMPLES[name](draw, rows)
        low, high = of_scores(before, after).interval
        held += low <= truth <= high
    most = 1.0 if (name, rows) == ("0/1, few", 20) else 0.97  # four rows change: their share has too few values
    assert 0.93 <= held / TIMES <= most, held


@pytest.mark.real
@pytest.mark.parametrize("rows", [20, 50, 200])
def test_intervals_of_losses_hold_the_truth(rows: int, untested: None) -> None:
    """Rows of very different lengths, and differences a token that are skewed."""
    draw, held = np.random.default_rng(rows), 0
    for _ in range(TIMES):
        tokens = np.ceil(draw.lognormal(2, 0.7, rows))
        differences = tokens * (0.4 - draw.gamma(2, 0.25, rows))
        low, high = of_losses(tokens * 2, tokens * 2 + differences, tokens).interval
        held += low <= -0.1 <= high
    assert 0.93 <= held / TIMES <= 0.97, held
