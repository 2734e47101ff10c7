"""Running the command line in this process, and a small trained adapter to run it on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.cli import main
from tests.conftest import questions


@dataclass
class Ran:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The last line of stdout."""
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """`run("adapters", "list")` runs a command; a traceback on stderr fails the test."""

    def call(*words: object) -> Ran:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return Ran(int(ended.value.code or 0), printed.out, printed.err)

    return call


@pytest.fixture
def data(write_rows: Callable[..., Path]) -> Path:
    """A folder of prompt and completion rows with train, valid and test files."""
    for name, start in (("train", 0), ("valid", 100), ("test", 200)):
        write_rows(questions(24 if name == "train" else 5, start=start), name=f"{name}.jsonl")
    return write_rows(questions(24)).parent


@pytest.fixture
def trained(run: Callable[..., Ran], data: Path, tiny_path: Path) -> Ran:
    """`train --json` of an adapter called `mine` on the tiny model."""
    return run(
        "train", "--model", tiny_path, "--data", data, "--name", "mine", "--json", "train.iters=4",
        "train.batch_size=4", "train.learning_rate=0.01", "adapter.rank=4",
    )  # fmt: skip
