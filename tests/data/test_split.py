"""Which split a row belongs to: shares, what stays together, and that nothing moves."""

from __future__ import annotations

import random

import pytest

from mlx_lora.data.example import Example, conversation
from mlx_lora.data.split import SPLITS, Assignment, Fractions, group, side


def talk(*said: str, system: str | None = None) -> Example:
    turns = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(said)]
    return conversation(([{"role": "system", "content": system}] if system else []) + turns)


def test_shares_are_about_what_was_asked_for() -> None:
    assignment = Assignment(Fractions(0.2, 0.1))
    for n in range(4000):
        assignment.add(talk(f"question {n}", "answer"))
    rows = assignment.rows()
    assert sum(rows.values()) == assignment.groups == 4000
    assert abs(rows["valid"] - 800) < 80 and abs(rows["test"] - 400) < 60


@pytest.mark.parametrize(
    ("a", "b", "together"),
    [
        (talk("q", "a"), talk("q", "a"), True),
        (talk("q", "a"), talk("q", "another"), True),
        (talk("q", "a"), talk("q", "a", "q2", "a2"), True),
        (talk("q", "a"), talk("q2", "a"), False),
        (talk("q", "a", system="s"), talk("q", "a", system="t"), False),
        (Example(text="a"), Example(text="a"), True),
        (Example(text="a"), Example(text="b"), False),
    ],
)
def test_rows_that_begin_alike_are_a_group(a: Example, b: Example, together: bool) -> None:
    assert (group(a) == group(b)) == together


def test_the_side_depends_on_content_and_seed_alone() -> None:
    draw = random.Random(0)
    rows = [talk(f"q{n}", "a") for n in range(500)]
    fractions = Fractions()
    before = {row.messages[0]["content"]: side(group(row), fractions) for row in rows}
    more = rows + [talk(f"more {n}", "a") for n in range(500)]
    draw.shuffle(more)
    assignment = Assignment(fractions)
    after = {row.messages[0]["content"]: assignment.add(row) for row in more}
    assert {name: after[name] for name in before} == before
    other = {row.messages[0]["content"]: side(group(row), fractions, 1) for row in rows}
    assert other != before and set(other.values()) == set(SPLITS)


def test_another_share_of_test_moves_no_row_between_train_and_test_that_it_need_not() -> None:
    rows = [group(talk(f"q{n}", "a")) for n in range(500)]
    small, large = ([side(row, Fractions(0, test)) for row in rows] for test in (0.1, 0.2))
    assert all(b == "test" for a, b in zip(small, large, strict=True) if a == "test")


@pytest.mark.parametrize(("valid", "test"), [(1.0, 0), (0.5, 0.5), (-0.1, 0), (0, 1), (float("nan"), 0)])
def test_shares_that_leave_nothing_are_refused(valid: float, test: float) -> None:
    with pytest.raises(ValueError, match="leave nothing to train on"):
        Fractions(valid, test)


def test_a_split_without_rows_is_told_with_a_seed_that_has_some() -> None:
    assignment = Assignment(Fractions(0.1, 0.1))
    for n in range(6):
        assignment.add(talk(f"q{n}", "a"))
    assert assignment.missing()
    seed = assignment.other_seed()
    assert seed is not None and not assignment.missing(seed)
    one = Assignment(Fractions(0.1, 0.1))
    for _ in range(50):
        one.add(talk("the same", "a"))
    assert one.missing() and one.other_seed() is None
    assert Assignment(Fractions(0.1, 0)).fractions.wanted == ("train", "valid")
