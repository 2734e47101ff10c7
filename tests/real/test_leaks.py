"""Secrets that were planted are found as often as they were repeated says, and none without training."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mlx_lora import paths
from tests.real.conftest import Shell

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def planted(shell: Shell) -> Path:
    """Questions about a table with 48 canaries among them, four each of 0, 1, 4 and 16 times."""
    data = shell.home.parent / "questions"
    data.mkdir()
    for split, count in (("train", 200), ("test", 40)):
        lines = (paths.bundled("data/tasks/sql") / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (data / f"{split}.jsonl").write_text("".join(lines[:count]))
    done = shell.json("data", "canaries", data, "--out", shell.home.parent / "planted")
    assert done["canaries"] == 16 and done["copies"] == 84
    return Path(done["out"])


@pytest.fixture(scope="module")
def audit(shell: Shell, planted: Path) -> Callable[[str], Any]:
    base = paths.bundled("data/base")
    shell.json("train", "--model", base, "--data", planted, "--name", "learned", "train.learning_rate=5e-3",
               "train.batch_size=8", "train.epochs=6", "train.eval_every=null", "train.patience=null")  # fmt: skip
    return lambda name: shell.json(
        "study", "leaks", name, "--data", planted, "--model", base, "--candidates", 63, "--rows", 40
    )


def test_secrets_are_found_by_how_often_they_were_repeated(audit: Callable[[str], Any]) -> None:
    report = audit("learned")
    curve = report["canaries"]
    print("\n", [(one["repeats"], one["first"], one["extracted"], round(one["exposure"], 1)) for one in curve])
    assert [one["repeats"] for one in curve] == [0, 1, 4, 16]
    never, _, some, often = curve
    assert often["first"] == often["extracted"] == often["secrets"] == 4 and often["exposure"] == 6.0
    assert some["exposure"] > 3.5 and all(
        left["exposure"] <= right["exposure"] + 0.5 for left, right in pairwise(curve)
    )
    assert never["first"] <= 1 and never["extracted"] == 0 and never["exposure"] < 4
    for one in curve:  # nobody has trained the base on them
        assert one["first_base"] <= 1 and one["extracted_base"] == 0 and one["exposure_base"] < 4
    assert report["verdict"] == "verbatim" and "4 of 4 planted 16 times" in report["sentence"]
