"""`eval --score` from the command line: chosen and said, shown and in JSON, and refused before a model is loaded."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Ran

Run = Callable[..., Ran]


@pytest.fixture
def labelled(write_rows: Callable[..., Path]) -> Path:
    rows = [{"prompt": f"mail {number}", "completion": ("later", "now")[number % 2]} for number in range(6)]
    return write_rows(rows, name="test.jsonl")


def test_labels_are_chosen_and_said_and_told_as_json_and_in_a_table(run: Run, tiny_path: Path, labelled: Path) -> None:
    words = ("eval", "--model", tiny_path, "--data", labelled, "--score", "auto")
    ran = run(*words, "--json")
    assert ran.code == 0 and "score: accuracy, since 6 wanted answers are 2 short texts that repeat" in ran.err
    (result,) = ran.json["results"]
    assert (result["score_name"], result["exact_match"]) == ("accuracy", None) and "each" not in result
    confusion = result["details"]["confusion"]
    assert sum(sum(row.values()) for row in confusion.values()) == 6
    assert result["score"] == (confusion["now"]["now"] + confusion["later"]["later"]) / 6
    shown = run(*words)
    assert shown.code == 0 and "accuracy" in shown.out and "(base), accuracy: wanted" in shown.out
    assert "later" in shown.out.splitlines()[-2] and "now" in shown.out.splitlines()[-1]


def test_several_scores_of_the_same_answers(run: Run, tiny_path: Path, labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def score(wanted, answer): return len(wanted) == 5")
    words = ["--score", "scorer", "--score", "pattern", "--score", "exact", "--exact", "--max-tokens", 2]
    given = ["--scorer", tmp_path / "own.py", "--pattern", "."]
    ran = run("eval", "--model", tiny_path, "--data", labelled, *words, *given, "--json")
    assert ran.code == 0, ran.err
    assert "own.py: it is code" in ran.err
    (result,) = ran.json["results"]
    assert result["score_name"] == "scorer" and result["score"] == 0.5
    more = result["details"]["more"]
    assert list(more) == ["pattern", "exact"] and more["exact"]["score"] == result["exact_match"]


def test_a_file_for_a_score_asks_for_it(run: Run, tiny_path: Path, write_rows: Callable[..., Path]) -> None:
    file = write_rows([{"prompt": str(number), "completion": f"select {number}"} for number in range(3)])
    database = file.with_name("own.sqlite")
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("create table t (x)")
    words = ("eval", "--model", tiny_path, "--database", database, "--max-tokens", 2, "--json", "--data")
    ran = run(*words, file, "--pattern", "select")
    assert ran.code == 0 and ran.json["results"][0]["score_name"] == "pattern", ran.err
    assert ran.json["results"][0]["details"]["more"]["sql"]["wanted_failed"] == 0
    other = write_rows([{"prompt": "x", "completion": "no query"}], name="other.jsonl")
    ran = run(*words, other)
    assert ran.code == 1 and "none of the first 1 wanted answers runs as a query on own.sqlite" in ran.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--score", "acuracy"], "did you mean 'accuracy'"), (["--score", "sql"], "--database FILE"),
        (["--pattern", "("], "not a regular expression"), (["--database", "absent.sqlite"], "absent.sqlite"),
        (["--scorer", "absent.py"], "absent.py: no such file"), (["--tolerance", "x"], "--tolerance is 'x'"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused_before_loading(run: Run, labelled: Path, words: list[str], said: str) -> None:
    ran = run("eval", "--model", "nowhere", "--data", labelled, *words)
    assert ran.code == 1 and said in ran.err and "nowhere" not in ran.err


def test_plain_text_has_nothing_to_score(run: Run, tiny_path: Path, write_rows: Callable[..., Path]) -> None:
    rows: list[Any] = [{"text": "once upon a time"}]
    ran = run("eval", "--model", tiny_path, "--data", write_rows(rows), "--score", "auto")
    assert ran.code == 1 and "--score" in ran.err
