"""Five adapters whose verdict is known beforehand, trained here over the base that comes with the project."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_lora import paths
from tests.cli.conftest import Ran

Run = Callable[..., Ran]
BASE = paths.bundled("data", "base")
QUICK = ("train.eval_every=null", "quantize=null", f"model={BASE}")

pytestmark = pytest.mark.real


def rows(task: str, split: str) -> list[dict[str, Any]]:
    text = paths.bundled("data", "tasks", task, f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def file_of(folder: Path, found: list[dict[str, Any]]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return file


def judged(run: Run, data: Path, *more: str) -> dict[str, Any]:
    ran = run("verdict", "--model", BASE, "--adapter", "mine", "--data", data, "--json", *more)
    assert ran.code == 0, ran.err
    (result,) = ran.json["results"]
    return dict(result)


def trained(run: Run, task: str, *settings: str, steps: int = 60) -> None:
    recipe = paths.bundled("recipes", f"{task}.yaml")
    ran = run("train", recipe, "--name", "mine", *QUICK, f"train.iters={steps}", *settings)
    assert ran.code == 0, ran.err


def test_helped(run: Run, tmp_path: Path) -> None:
    trained(run, "sql", steps=50)
    found = judged(run, file_of(tmp_path, rows("sql", "test")[:40]), "--max-tokens", "40")
    assert found["verdict"] == "helped" and found["interval"][0] > 0.2 and found["fixed"] > 10 and not found["broken"]
    assert "forgot" not in found["sentence"] and "no worse" in found["sentence"]
    few = judged(run, file_of(tmp_path, rows("sql", "test")[:8]), "--forget", "none", "--max-tokens", "40")
    assert few["verdict"] == "too_few_rows" and few["rows"] == 8 and "too few rows to say" in few["sentence"]


def test_hurt_by_a_rate_far_too_high(run: Run, tmp_path: Path) -> None:
    trained(run, "sql", "train.learning_rate=0.3", steps=10)
    found = judged(run, file_of(tmp_path, rows("sql", "test")[:40]), "--max-tokens", "24")
    assert found["verdict"] == "hurt" and found["interval"][1] < 0 and found["tuned"] < found["base"]
    assert found["drift"]["loss_general_tuned"] > found["drift"]["loss_general_base"] + 0.1
    assert "and it forgot general text" in found["sentence"]


def test_no_difference_after_learning_noise(run: Run, tmp_path: Path) -> None:
    """The queries are dealt out anew among the questions: there is nothing to learn but what a query looks like."""
    shuffled = rows("sql", "train")[:400]
    answers = [row["completion"] for row in shuffled]
    random.Random(1).shuffle(answers)
    learned = file_of(tmp_path, [{**row, "completion": said} for row, said in zip(shuffled, answers, strict=True)])
    trained(run, "sql", f"data.path={learned}", steps=30)
    test = file_of(tmp_path, rows("sql", "test")[:60])
    found = judged(run, test, "--forget", "none", "--score", "exact", "--max-tokens", "40")
    assert found["verdict"] == "no_difference" and found["interval"][0] < 0 < found["interval"][1]
    assert "while its loss fell" in found["sentence"], "the form of a query is learned"


def test_helped_and_forgot_general_text(run: Run, tmp_path: Path) -> None:
    trained(run, "mail", steps=60)
    found = judged(run, file_of(tmp_path, rows("mail", "test")[:60]), "--max-tokens", "8")
    assert found["verdict"] == "helped" and found["interval"][0] > 0
    drift = found["drift"]
    assert drift["loss_general_tuned"] > drift["loss_general_base"] + 0.1 and drift["loss_general_interval"][0] > 0
    assert "but it forgot general text" in found["sentence"] and drift["kl_general"] > 0.5
    words = ("verdict", "--model", BASE, "--adapter", "mine", "--data", tmp_path / "rows.jsonl", "--max-tokens", 8)
    assert "adapters blend mine --scale auto" in run(*words).err
