"""The small task sets for real models: as their script makes them, without faults or leaks, and right in themselves."""

from __future__ import annotations

import csv
import filecmp
import json
import sqlite3
from pathlib import Path

import pytest

from data.make.everyday import SETS, make_everyday
from data.make.everyday.shop import write_database
from mlx_lora import paths
from mlx_lora.config import Data
from mlx_lora.data.check import check
from mlx_lora.data.read import read
from mlx_lora.models.open import load_tokenizer
from mlx_lora.recipe import load_recipe

TASKS = paths.bundled("data", "tasks")
FORMATS = {
    "summaries": "messages", "replies": "alpaca", "fields": "completions", "database": "completions",
    "terms": "completions", "support": "completions",
}  # fmt: skip


@pytest.mark.parametrize(("task", "format"), FORMATS.items())
def test_tasks_have_no_faults_and_no_leaks(task: str, format: str) -> None:
    report = check(TASKS / task, Data(), load_tokenizer(paths.bundled("data", "base")))
    assert report.format == format and not report.problems
    assert report.leaked_rows == 0 and report.duplicates == 0
    files = {Path(name).stem: rows for name, rows in report.files.items()}
    assert 60 <= files["train"] <= 120 and 30 <= files["test"] <= 45


@pytest.mark.parametrize("task", FORMATS)
def test_no_test_row_asks_what_a_training_row_asks(task: str) -> None:
    train, test = (
        {
            example.messages[0]["content"]
            for file in (TASKS / task).glob(f"{split}.*")
            for example in read(file, Data()).examples
        }
        for split in ("train", "test")
    )
    assert len(test) >= 30 and not train & test


@pytest.mark.parametrize("task", SETS)
def test_an_answer_comes_again_only_in_the_database_as_its_readme_says(task: str) -> None:
    train, test = (
        [
            example.messages[-1]["content"]
            for file in (TASKS / task).glob(f"{split}.*")
            for example in read(file, Data()).examples
        ]
        for split in ("train", "test")
    )
    assert sum(answer in set(train) for answer in test) == (6 if task == "database" else 0)


def test_files_are_what_their_script_makes(tmp_path: Path) -> None:
    make_everyday(tmp_path, 7)
    for task in SETS:
        made = sorted(file.name for file in (tmp_path / task).iterdir())
        rows = [name for name in made if not name.endswith(".db")]  # SQLite writes its own version into a database
        assert made == sorted(file.name for file in (TASKS / task).iterdir())
        assert filecmp.cmpfiles(tmp_path / task, TASKS / task, rows, shallow=False) == (rows, [], [])


def test_every_query_finds_something_in_the_shipped_database(tmp_path: Path) -> None:
    shipped = TASKS / "database" / "shop.db"
    database = sqlite3.connect(f"file:{shipped}?mode=ro", uri=True)
    for split in ("train", "test"):
        text = (TASKS / "database" / f"{split}.csv").read_text(encoding="utf-8")
        for row in csv.DictReader(text.splitlines()):
            (first, *_) = database.execute(row["answer"]).fetchall()
            assert first[0] is not None, row
    write_database(tmp_path / "again.db", 7)
    again = sqlite3.connect(tmp_path / "again.db")
    assert list(again.iterdump()) == list(database.iterdump())
    for opened in (database, again):
        opened.close()


def test_the_database_recipe_names_its_columns() -> None:
    system = load_recipe(paths.bundled("recipes", "database.yaml")).data.system
    database = sqlite3.connect(f"file:{TASKS / 'database' / 'shop.db'}?mode=ro", uri=True)
    for table in ("product", "sale"):
        columns = [name for _, name, *_ in database.execute(f"PRAGMA table_info({table})")]
        assert f"{table}({', '.join(columns)})" in str(system)
    database.close()


def test_records_hold_what_their_messages_say() -> None:
    for split in ("train", "test"):
        for line in (TASKS / "fields" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            record = json.loads(row["completion"])
            assert list(record) == ["name", "flat", "object", "day", "phone"]
            assert all(str(value) in row["prompt"] for value in record.values() if value is not None)
