"""`import-gguf` and `quantize` give a model a name in the home, as `pull` does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Ran
from tests.models.test_gguf import tiny as write_gguf

Run = Callable[..., Ran]
MAKERS = ["import-gguf", "quantize"]


@pytest.fixture
def source(tiny_path: Path, tmp_path: Path) -> Callable[[str], list[Any]]:
    """`source(command)`: the command and what it makes a model of."""
    return lambda command: [command, write_gguf(tmp_path / "base.gguf") if command == "import-gguf" else tiny_path]


@pytest.mark.parametrize("command", MAKERS)
def test_a_registered_name_is_a_model_that_others_use(
    command: str, source: Callable[[str], list[Any]], run: Run, home: Path
) -> None:
    words = source(command)
    made = run(*words, "--name", "mine", "--json")
    assert made.code == 0 and made.json["out"] == str(home / "models" / "mine")
    assert run("generate", "--model", "mine", "--prompt", "hello", "--raw", "--max-tokens", 1).code == 0
    taken = run(*words, "--name", "mine")
    assert taken.code == 1 and "exists" in taken.err and "--force" in taken.err
    assert run(*words, "--name", "mine", "--force").code == 0


@pytest.mark.parametrize("command", MAKERS)
def test_one_place_to_write_to_is_named(command: str, run: Run, tmp_path: Path) -> None:
    for words in ([], [tmp_path / "out", "--name", "mine"]):
        refused = run(command, "anything", *words)
        assert refused.code == 2 and "--name NAME" in refused.err
    refused = run(command, "anything", "--name", "my model")
    assert refused.code == 1 and "my-model" in refused.err
    assert "--name" in run(command, "--help").out and "[OUT]" in run(command, "--help").out
