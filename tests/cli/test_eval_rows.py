"""Which rows `eval` scores: named, and told apart from those that an adapter was trained on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ran
from tests.conftest import questions

Run = Callable[..., Ran]


@pytest.mark.parametrize(
    ("files", "used"),
    [(("train", "valid", "test"), "test"), (("train", "valid"), "valid"), (("train",), "train")],
)
def test_eval_without_a_test_file_names_the_file_it_used(
    run: Run, tiny_path: Path, write_rows: Callable[..., Path], files: tuple[str, ...], used: str
) -> None:
    for index, name in enumerate(files):
        folder = write_rows(questions(3, start=index), name=f"{name}.jsonl").parent
    ran = run("eval", "--model", tiny_path, "--data", folder, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["file"] == str(folder / f"{used}.jsonl") and len(ran.json["results"]) == 1
    assert f"evaluating on {folder / used}.jsonl" in ran.err
    assert ("warning: " in ran.err and "training rows" in ran.err) == (used == "train")


def test_eval_warns_of_rows_that_the_adapter_was_trained_on(
    run: Run, trained: Ran, tiny_path: Path, data: Path, tmp_path: Path
) -> None:
    """By their bytes, under any name; not of rows that only chose when to stop, nor of other rows."""
    shutil.copyfile(data / "train.jsonl", tmp_path / "exam.jsonl")
    words = ("eval", "--model", tiny_path, "--data")
    ran = run(*words, tmp_path / "exam.jsonl", "--adapter", "mine")
    assert ran.code == 0
    assert (
        "warning: " in ran.err and "holds the rows that mine learned: the score says nothing about new ones" in ran.err
    )
    for rows, adapters in ((data, ("--adapter", "mine")), (data / "valid.jsonl", ("--adapter", "mine")),
                           (tmp_path / "exam.jsonl", ())):  # fmt: skip
        ran = run(*words, rows, *adapters)
        assert ran.code == 0 and "warning: " not in ran.err
