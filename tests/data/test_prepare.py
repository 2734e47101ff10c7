"""From a path to training and validation rows: what is set aside, and one error for all faults."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_lora.config import Data
from mlx_lora.data.prepare import prepare, set_aside
from mlx_lora.data.rows import Row, RowFile
from mlx_lora.errors import DataError
from tests.conftest import questions


def numbered(count: int, rows_each: int = 1) -> RowFile:
    """`count` examples of some rows each, whose first tokens count the rows."""
    rows = RowFile()
    for index in range(count * rows_each):
        rows.append([index, 0], [0, 1], index // rows_each)
    return rows


def turns(count: int) -> list[dict[str, str]]:
    return [{"role": role, "content": "x"} for _ in range(count) for role in ("user", "assistant")]


def numbers(rows: Sequence[Row]) -> list[int]:
    return [int(row.tokens[0]) for row in rows]


@pytest.mark.parametrize(
    ("count", "fraction", "valid"),
    [(1, 0.1, 0), (2, 0.1, 1), (2, 0.99, 1), (10, 0.1, 1), (10, 0.01, 1), (10, 0.99, 9), (100, 0.25, 25), (9, 0, 0)],
)
def test_set_aside_leaves_a_row_on_each_side(count: int, fraction: float, valid: int) -> None:
    train, held = set_aside(numbered(count), fraction, seed=0)
    assert len(held) == valid
    assert sorted(numbers(train) + numbers(held)) == list(range(count))
    assert numbers(train) == sorted(numbers(train)) and numbers(held) == sorted(numbers(held)), "file order stays"


def test_rows_of_one_example_stay_on_one_side() -> None:
    train, held = (numbers(side) for side in set_aside(numbered(20, rows_each=3), 0.25, seed=0))
    assert len(held) == 15 and not {index // 3 for index in train} & {index // 3 for index in held}


def test_set_aside_depends_on_the_seed_alone() -> None:
    first = numbers(set_aside(numbered(100), 0.1, seed=0)[1])
    np.random.seed(3)
    assert numbers(set_aside(numbered(100), 0.1, seed=0)[1]) == first
    assert numbers(set_aside(numbered(100), 0.1, seed=1)[1]) != first
    assert first != list(range(10)) and first != list(range(90, 100)), "not one end of the file"


@pytest.mark.parametrize(
    ("valid_rows", "settings", "sizes"),
    [
        (None, {}, (18, 2)),
        (None, {"valid_fraction": 0}, (20, 0)),
        (3, {}, (20, 3)),
        (3, {"valid_fraction": 0}, (20, 3)),
    ],
)
def test_a_validation_file_wins_over_the_fraction(
    tokenizer: Any, write_rows: Callable[..., Path], valid_rows: int | None, settings: Any, sizes: tuple[int, int]
) -> None:
    folder = write_rows(questions(20)).parent
    if valid_rows:
        write_rows(questions(valid_rows, start=50), name="valid.jsonl")
    prepared = prepare(folder, Data(**settings), tokenizer)
    assert (len(prepared.train), len(prepared.valid)) == sizes
    assert prepared.format == "completions"


def test_files_are_described_without_their_text(tokenizer: Any, write_rows: Callable[..., Path]) -> None:
    file = write_rows([{"prompt": "a secret", "completion": "kept"}] * 2)
    (described,) = prepare(file, Data(valid_fraction=0), tokenizer).files
    assert described.pop("sha256") and described == {
        "file": "train.jsonl",
        "rows": 2,
        "tokens": 34,
        "trained_tokens": 10,
        "answers": 1,
    }
    assert "secret" not in json.dumps(described)


@pytest.mark.parametrize(
    ("rows", "answers"),
    [
        ([{"prompt": "a", "completion": "b"}], 1),
        ([{"messages": turns(1)}, {"messages": turns(3)}], 3),
        ([{"messages": [{"role": "system", "content": "s"}, *turns(1)]}], 1),
        ([{"text": "plain"}], 0),
    ],
)
def test_a_file_says_how_many_answers_a_row_holds(
    tokenizer: Any, write_rows: Callable[..., Path], rows: list[Any], answers: int
) -> None:
    """From which chat knows an adapter of single questions."""
    (described,) = prepare(write_rows(rows), Data(valid_fraction=0), tokenizer).files
    assert described["answers"] == answers


def test_every_problem_of_every_file_is_in_one_error(tokenizer: Any, write_rows: Callable[..., Path]) -> None:
    folder = write_rows([{"text": ""}, {"text": "x"}, {"text": "y" * 50}, {"prompt": "z"}]).parent
    write_rows([{"text": 5}], name="valid.jsonl")
    write_rows([{"text": 5}], name="test.jsonl")  # training doesn't read it
    with pytest.raises(DataError) as caught:
        prepare(folder, Data(max_seq_length=20), tokenizer)
    where = sorted((Path(problem.file).name, problem.line) for problem in caught.value.problems)
    assert where == [("train.jsonl", 1), ("train.jsonl", 3), ("train.jsonl", 4), ("valid.jsonl", 1)]
    assert "data check" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("files", "settings", "said"),
    [
        ({"test": questions(2)}, {}, "has no train.jsonl"),
        ({"train": questions(2)}, {"max_seq_length": 4, "too_long": "drop"}, "train.jsonl: no row is left to train on"),
        (
            {"train": questions(2), "valid": [{"prompt": "a" * 99, "completion": "b"}]},
            {"max_seq_length": 50, "too_long": "drop"},
            "valid.jsonl: no row is left to validate on",
        ),
        ({"train": questions(2), "valid": []}, {}, "valid.jsonl: is empty"),
    ],
)
def test_nothing_left_is_an_error(
    tokenizer: Any, write_rows: Callable[..., Path], files: dict[str, Any], settings: Any, said: str
) -> None:
    for name, rows in files.items():
        folder = write_rows(rows, name=f"{name}.jsonl").parent
    with pytest.raises(DataError, match=said):
        prepare(folder, Data(**settings), tokenizer)


def test_dropped_and_truncated_rows_are_counted(tokenizer: Any, write_rows: Callable[..., Path]) -> None:
    long = [{"prompt": "a" * 99, "completion": "b"}] * 3
    file = write_rows(questions(5) + long)
    counts = {}
    for choice in ("drop", "truncate-start"):
        prepared = prepare(file, Data(max_seq_length=50, too_long=choice, valid_fraction=0), tokenizer)
        counts[choice] = (len(prepared.train), prepared.dropped, prepared.truncated)
    assert counts == {"drop": (5, 3, 0), "truncate-start": (8, 0, 3)}
