"""Lengths as numbers and as bars."""

from __future__ import annotations

import random

import pytest

from mlx_lora.data.histogram import Bin, Lengths, bar, lines


@pytest.mark.parametrize("most", [1, 5, 12])
@pytest.mark.parametrize("longest", [1, 7, 90, 3000, 10**6])
def test_every_row_is_in_one_bin(longest: int, most: int) -> None:
    draw = random.Random(longest)
    lengths = [draw.randint(1, longest) for _ in range(500)]
    bins = Lengths(lengths).bins(most)
    assert 1 <= len(bins) <= most
    for low, high, rows in bins:
        assert rows == sum(low <= length <= high for length in lengths)
    assert sum(row.rows for row in bins) == 500
    assert all(a.high + 1 == b.low for a, b in zip(bins, bins[1:], strict=False))


def test_shares_and_rows_over_a_limit() -> None:
    lengths = Lengths()
    for length in (1, 2, 3, 4, 100):
        lengths.add(length)
    assert (lengths.share(0.5), lengths.share(0.8), lengths.share(1)) == (3, 4, 100)
    assert (lengths.over(4), lengths.over(100), lengths.over(0)) == (1, 0, 5)
    assert Lengths().share(0.5) is None and Lengths().bins() == []


@pytest.mark.parametrize(
    ("share", "shown"), [(0, ""), (1, "████"), (0.5, "██"), (0.125, "▌"), (0.001, "▏"), (0.47, "█▉"), (0.99, "████")]
)
def test_a_bar_to_an_eighth(share: float, shown: str) -> None:
    assert bar(share, 4) == shown


def test_lines_are_as_wide_as_they_may_be() -> None:
    shown = lines([Bin(0, 999, 1), Bin(1000, 1999, 0), Bin(2000, 2999, 2000)], 40)
    assert shown[0] == "    0 –   999 ▏ 1"
    assert shown[1] == "1,000 – 1,999 0"
    assert shown[2].endswith("█ 2,000") and max(map(len, shown)) == len(shown[2]) <= 40
    assert lines([], 40) == []
