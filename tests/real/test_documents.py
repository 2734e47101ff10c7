"""What the documents tell a user to type is typed: README's own-data block, its session, and every recipe's header."""

from __future__ import annotations

import io
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_lora import cli
from tests import documents, session
from tests.documents import ROOT

pytestmark = pytest.mark.real
# Recipes whose base is the embedded one; the others need a model from a network, or a Mac's memory.
OWN = [
    file for file in sorted(ROOT.glob("recipes/**/*.yaml")) if "model: data/base" in file.read_text(encoding="utf-8")
]
Type = Callable[[list[str]], str]


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Type:
    """Run a command line in this process; it must succeed. Returns what it printed."""

    def run(arguments: list[str]) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        printed = capsys.readouterr()
        assert not ended.value.code, f"mlx-lora {shlex.join(arguments)}\n{printed.err}"
        return printed.out

    return run


def test_your_own_data_in_an_hour(typed: Type, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's block, line by line, with the embedded base under the name that `pull` would have given."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    own = text[text.index("## Your own data in an hour") :]
    block = own[own.index("```sh\n") + 6 :]
    lines = documents.commands(block[: block.index("```")])
    shutil.copytree(ROOT / "data" / "base", home / "models" / "qwen")
    (tmp_path / "my-data").mkdir()
    for split, count in (("train", 60), ("valid", 8), ("test", 8)):
        rows = (ROOT / "data" / "tasks" / "sql" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (tmp_path / "my-data" / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("How many orders are in Riga?\n/bye\n"))  # a chat of one question
    done = []
    for words in lines:
        arguments = documents.of_program(words)
        assert arguments is not None
        if arguments[0] == "pull" or "--resume" in arguments:  # the network; a run that was stopped
            continue
        if arguments[0] in ("fuse", "export"):  # a tiny base hardly moves in so few steps
            arguments.append("--force")
        typed(arguments)
        done.append(arguments[0])
    assert done == [
        "data", "init", "plan", "train", "verdict", "report", "generate", "chat", "adapters", "fuse", "export",
    ]  # fmt: skip
    assert json.loads((tmp_path / "fused" / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("recipe", OWN, ids=lambda file: file.stem)
def test_a_recipe_s_header_runs(recipe: Path, typed: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own commands with fewer steps; `study compare` runs all files of the folder, which has a test of its own."""
    monkeypatch.chdir(ROOT)
    for label, words in documents.header_commands(recipe):
        arguments = documents.of_program(words)
        assert arguments is not None
        if arguments[0] == "train":
            typed([*arguments, "train.iters=2", "train.epochs=1", "data.valid_fraction=0.0"])
        elif label == "Try it":
            typed([argument for argument in arguments if argument != "--exact"])


def test_the_session_prints_what_the_readme_says(tmp_path: Path) -> None:
    assert session.words(session.run(session.written(), tmp_path / "home")) == session.words(session.written())
