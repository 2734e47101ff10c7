"""Repetition among rows: exact, near, leaked, and the same prompt with other answers."""

from __future__ import annotations

import random
from typing import Any

import pytest

from mlx_lora.data.duplicates import SIMILAR, Duplicates, Pair, Place, runs_of_words, similarity
from mlx_lora.data.example import Example, conversation


def text(words: list[str]) -> Example:
    return Example(text=" ".join(words))


def asked(prompt: str, answer: str, **more: Any) -> Example:
    return conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], **more)


def fed(rows: dict[str, list[Example]], **options: int) -> Duplicates:
    found = Duplicates(**options)
    for split, examples in rows.items():
        for line, example in enumerate(examples, start=1):
            found.add(split, line, example)
    return found


def test_exact_repetition_and_leaks_by_line() -> None:
    a, b, c = (asked(letter, letter) for letter in "abc")
    report = fed({"train": [a, b, a], "valid": [c, b, b], "test": [a]}).report()
    assert report.duplicates == 2
    assert report.leaked == {"valid": 2, "test": 1}
    assert report.leaked_examples["valid"] == [
        Pair(Place("valid", 2), Place("train", 2)), Pair(Place("valid", 3), Place("train", 2))
    ]  # fmt: skip
    assert report.leaked_examples["test"] == [Pair(Place("test", 1), Place("train", 1))]


def test_nothing_and_one_row() -> None:
    assert Duplicates().report() == fed({"train": []}).report()
    one = fed({"train": [asked("a", "b")]}).report()
    assert (one.duplicates, one.leaked, one.other_answers, one.near.rows_sampled, one.near.pairs) == (0, {}, 0, 1, 0)


@pytest.mark.parametrize(
    ("rows", "prompts"),
    [
        ([asked("a", "1"), asked("a", "2"), asked("b", "1")], 1),
        ([asked("a", "1"), asked("a", "1")], 0),
        ([asked("a", "1"), asked("a", "2"), asked("a", "3"), asked("b", "1"), asked("b", "2")], 2),
        ([asked("a", "1"), asked("a", "2", tools=({"name": "x"},))], 0),
        ([Example(text="a"), Example(text="b")], 0),
    ],
)
def test_the_same_prompt_with_other_answers(rows: list[Example], prompts: int) -> None:
    report = fed({"train": rows}).report()
    assert report.other_answers == prompts
    for pair in report.other_answers_examples:
        row, earlier = (rows[place.line - 1] for place in pair)
        assert row.messages[0] == earlier.messages[0] and row.messages[1] != earlier.messages[1]


def changed(words: list[str], count: int, draw: random.Random) -> list[str]:
    words = list(words)
    for place in draw.sample(range(len(words)), count):
        words[place] = f"new{draw.random()}"
    return words


def test_near_repetition_is_found_as_comparing_all_pairs_finds_it() -> None:
    """Rows with a few words changed, on both sides of the limit: nearly all that are near, and none that isn't."""
    draw = random.Random(1)
    words = [f"w{n}" for n in range(3000)]
    rows = [draw.choices(words, k=draw.randint(30, 120)) for _ in range(200)]
    rows += [changed(rows[index], draw.randint(1, 8), draw) for index in range(150)]
    sets = [runs_of_words(text(row)) for row in rows]
    near = {i for i in range(len(rows)) for j in range(i) if similarity(sets[i], sets[j]) >= SIMILAR}
    report = fed({"train": [text(row) for row in rows]}).report().near
    assert 30 < len(near) < 150, "the set is on both sides of the limit"
    assert len(near) - 2 <= report.pairs <= len(near)
    for pair in report.examples:
        assert similarity(sets[pair.row.line - 1], sets[pair.earlier.line - 1]) >= SIMILAR


def test_near_repetition_between_files_and_in_a_long_cluster() -> None:
    draw = random.Random(2)
    words = [f"w{n}" for n in range(100)]
    cluster = [text(changed(words, 1, draw)) for _ in range(60)]
    report = fed({"train": cluster[:50], "valid": cluster[50:]}).report().near
    assert report.pairs == 59 and 1 <= report.across <= 10


def test_a_long_system_message_makes_nothing_near() -> None:
    system = {"role": "system", "content": " ".join(f"rule{n}" for n in range(300))}
    rows = [
        conversation(
            [system, {"role": "user", "content": f"a{n} b{n} c{n}"}, {"role": "assistant", "content": f"d{n}"}]
        )
        for n in range(20)
    ]
    assert fed({"train": rows}).report().near.pairs == 0


def test_characters_are_the_words_of_languages_without_spaces() -> None:
    row = "今日は天気がいいので公園を散歩してから図書館へ行きます"
    report = fed({"train": [Example(text=row), Example(text=row + "よ")]}).report()
    assert report.near.pairs == 1


def test_the_sample_is_the_same_in_any_order() -> None:
    draw = random.Random(3)
    rows = [text(draw.choices("abcdefghijklm", k=30)) for _ in range(300)]
    rows += [text(f"{row.text} x".split()) for row in rows[:50]]
    sampled = []
    for _ in range(3):
        draw.shuffle(rows)
        found = fed({"train": [*rows, *rows[:20]]}, most_near=100)
        report = found.report()
        sampled.append((report.near.rows_sampled, {rows[place.line - 1].text for _, place, _ in found._sample}))
        assert report.duplicates == 20
    assert sampled[0] == sampled[1] == sampled[2] and sampled[0][0] == 100
