"""The six recipes for real tasks on SmolLM2, with a part of their rows: each verdict is that the adapter helped."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from mlx_lora import paths
from tests.real.conftest import ROOT, Shell

pytestmark = pytest.mark.real
# Rows to learn and to judge by: enough for a clear verdict, few enough for a test. Labels take more, and are short.
ROWS = {
    "support": (80, 45), "terms": (32, 16), "database": (32, 16), "replies": (32, 16), "fields": (32, 16),
    "summaries": (32, 16),
}  # fmt: skip
EPOCHS, RATE = 2, 1e-3
# Tokens of an answer at most, where the wanted ones are no longer: the base doesn't end by itself.
TOKENS = {"support": 8, "terms": 48, "database": 48, "replies": 48, "fields": 80, "summaries": 48}


def part(task: str, folder: Path) -> Path:
    """The first rows of a task's files, and whatever else lies beside them."""
    shutil.copytree(paths.bundled("data", "tasks", task), folder)
    for split, count in zip(("train", "test"), ROWS[task], strict=True):
        (file,) = folder.glob(f"{split}.*")
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        file.write_text("".join(lines[: count + (file.suffix == ".csv")]), encoding="utf-8")
    return folder


@pytest.mark.parametrize("task", ROWS)
def test_the_adapter_of_a_recipe_helps(task: str, shell: Shell, smollm2: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    data = part(task, tmp_path / task)
    trained = shell.json("train", ROOT / "recipes" / f"{task}.yaml", "--model", smollm2, "--data", data,
                         f"train.epochs={EPOCHS}", f"train.learning_rate={RATE}", "data.valid_fraction=0")  # fmt: skip
    verdict = shell.json("verdict", "--model", smollm2, "--adapter", task, "--data", data, "--forget", "none",
                         "--max-tokens", TOKENS[task])  # fmt: skip
    (result,) = verdict["results"]
    print(f"\n{task}: {trained['seconds']:.0f} s of training, {time.monotonic() - start:.0f} s in all; {result}")
    assert result["verdict"] == "helped", result
