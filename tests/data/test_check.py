"""The report over a data path: problems, sizes, duplicates, leaks, and samples for people."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.config import Data
from mlx_lora.data.check import check, samples
from mlx_lora.data.encode import Encoder
from tests.data.conftest import ROWS, TALK, message

A, B, C, D = ({"prompt": letter, "completion": letter * 2} for letter in "abcd")


def talk(row: dict[str, str]) -> dict[str, Any]:
    """A completion row in the form of messages, with its keys in another order."""
    turns = [{"content": row["prompt"], "role": "user"}, {"content": row["completion"], "role": "assistant"}]
    return {"id": 7, "messages": turns}


@pytest.mark.parametrize(
    ("files", "duplicates", "leaked"),
    [
        ({"train": [A, B, C]}, 0, 0),
        ({"train": [A, B, A, A]}, 2, 0),
        ({"train": [A, B], "valid": [C], "test": [D]}, 0, 0),
        ({"train": [A, B], "valid": [B], "test": [A, B, D]}, 0, 3),
        ({"train": [A, A], "valid": [A, A]}, 2, 2),
        ({"train": [A, B], "valid": [talk(B)]}, 0, 1),
        ({"train": [A, {"prompt": "a", "completion": "ab"}]}, 0, 0),
        ({"valid": [A], "test": [A]}, 0, 0),
    ],
)
def test_duplicates_inside_a_file_and_leaks_out_of_train(
    write_rows: Callable[..., Path], files: dict[str, Any], duplicates: int, leaked: int
) -> None:
    for name, rows in files.items():
        folder = write_rows(rows, name=f"{name}.jsonl").parent
    report = check(folder, Data(), allow_leaks=True)
    assert (report.duplicates, report.leaked_rows) == (duplicates, leaked)
    assert report.rows == sum(map(len, files.values())) and report.problems == []
    leaking = [problem.problem for problem in check(folder, Data()).problems]
    assert bool(leaking) == bool(leaked) and all("train.jsonl too" in problem for problem in leaking)


def test_a_leak_names_its_lines_and_those_it_repeats(write_rows: Callable[..., Path]) -> None:
    folder = write_rows([A, B, C]).parent
    file = write_rows([D, C, A], name="test.jsonl")
    (problem,) = check(folder, Data()).problems
    assert (problem.file, problem.line) == (str(file), 2)
    assert "2 rows are in train.jsonl too: line 2 is its line 3, line 3 is its line 1;" in problem.problem
    assert "--allow-leaks" in problem.problem


def test_what_is_said_of_contents(write_rows: Callable[..., Path]) -> None:
    rows = [{"prompt": f"is {n} even?", "completion": "no" if n % 2 else "yes"} for n in range(10)]
    rows += [{"prompt": "is 0 even?", "completion": "no"}, {"prompt": "write to a@example.com", "completion": "yes"}]
    report = check(write_rows(rows), Data())
    assert report.labels == {"no": 6, "yes": 6}
    assert report.personal == {"key": 0, "email": 1, "iban": 0, "card": 0, "phone": 0}
    assert report.same_prompt_different_answers == 1
    ((first, second),) = report.same_prompt_examples
    assert {first["line"], second["line"]} == {1, 11}
    assert report.near_duplicates["rows_sampled"] == 12
    assert report.tokens is report.histogram is report.over_context is report.plan is None
    assert "example.com" not in str(report.as_dict())


def test_lengths_and_rows_over_the_models_positions(tokenizer: Any, write_rows: Callable[..., Path]) -> None:
    file = write_rows([A, B, {"prompt": "x" * 40, "completion": "y"}])
    report = check(file, Data(), tokenizer, context=20)
    assert (report.context, report.over_context, report.typical) == (20, 1, [8, 46])
    assert report.histogram and sum(bin["rows"] for bin in report.histogram) == 3
    assert report.histogram[0]["low"] <= 8 and report.histogram[-1]["high"] >= 46
    assert check(file, Data(), tokenizer).over_context is None


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"prompt": "a", "completion": " "}, 1),
        ({"prompt": "", "completion": "b"}, 0),
        ({"messages": [message("user", "a"), message("assistant", "")]}, 1),
        ({"messages": [message("user", ""), message("assistant", "b")]}, 0),
        ({"instruction": "a", "output": ""}, 1),
    ],
)
def test_empty_answers(write_rows: Callable[..., Path], row: dict[str, Any], answers: int) -> None:
    report = check(write_rows([row]), Data())
    assert (report.empty_rows, report.empty_answers) == (1, answers)


def test_counts_with_a_tokenizer(tokenizer: Any, write_rows: Callable[..., Path]) -> None:
    folder = write_rows([A, B]).parent
    write_rows([{"prompt": "long", "completion": "c" * 20}], name="valid.jsonl")
    report = check(folder, Data(), tokenizer)
    # <|user|> a <|end|> \n <|assistant|> aa <|end|>: 8 tokens, 3 with loss
    assert (report.tokens, report.trained_tokens, report.longest) == (8 + 8 + 29, 3 + 3 + 21, 29)
    assert report.format == "completions"


def test_counts_without_a_tokenizer_are_unknown(write_rows: Callable[..., Path]) -> None:
    report = check(write_rows([A, B]), Data())
    assert (report.rows, report.tokens, report.trained_tokens, report.longest) == (2, None, None, None)


@pytest.mark.parametrize(
    ("too_long", "truncated", "dropped", "problems"),
    [("error", 0, 0, 2), ("drop", 0, 2, 0), ("truncate-start", 2, 0, 0), ("truncate-end", 1, 0, 1), ("split", 0, 0, 2)],
)
def test_what_too_long_did_is_counted(
    tokenizer: Any, write_rows: Callable[..., Path], too_long: str, truncated: int, dropped: int, problems: int
) -> None:
    rows = [A, {"prompt": "x" * 50, "completion": "y"}, {"prompt": "x", "completion": "y" * 50}]
    report = check(write_rows(rows), Data(max_seq_length=20, too_long=too_long), tokenizer)
    assert (report.truncated_rows, report.dropped_rows, len(report.problems)) == (truncated, dropped, problems)
    assert report.rows == 3


@pytest.mark.parametrize(
    ("rows", "empty"),
    [
        ([A, {"prompt": "", "completion": "b"}], 1),
        ([{"text": " "}, {"text": "\n"}, {"text": "x"}], 2),
        ([{"messages": [*TALK, message("assistant", "")]}], 1),
        ([{"text": ["it is empty"]}], 0),
        ([], 0),
    ],
)
def test_empty_rows(write_rows: Callable[..., Path], rows: list[Any], empty: int) -> None:
    report = check(write_rows(rows), Data())
    assert report.empty_rows == empty
    assert report.problems, "an empty row, and an empty file, is a problem"


def test_files_of_different_formats_are_named(write_rows: Callable[..., Path]) -> None:
    folder = write_rows([A]).parent
    write_rows([{"text": "x"}], name="valid.jsonl")
    assert check(folder, Data()).format == "completions and text"


def test_samples_mark_what_is_learned(tokenizer: Any, write_rows: Callable[..., Path]) -> None:
    (runs,) = samples(write_rows([ROWS["completions"], A]), Encoder(tokenizer, Data()), 1)
    assert runs == [("<|user|>two and two<|end|>\n<|assistant|>", False), ("four<|end|>", True)]
