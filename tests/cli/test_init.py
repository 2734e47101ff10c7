"""init: a recipe for a model and some data, by questions or by --yes; what it wrote trains."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_lora import ui
from mlx_lora.recipe import load_recipe
from tests.cli.conftest import Ran
from tests.conftest import write_model

Run = Callable[..., Ran]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe is written to the directory that the user is in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_questions_the_recipe_it_wrote_trains(run: Run, tiny_path: Path, data: Path, folder: Path) -> None:
    made = run("init", "--model", tiny_path, "--data", data, "--name", "mine", "--yes", "--json", "epochs=1").json
    assert made["out"] == "mine.yaml" and made["command"] == "mlx-lora train mine.yaml"
    assert made["rows"] == 29 and made["plan"]["fits"]
    assert made["settings"]["train.epochs"] == 1 and made["settings"]["train.learning_rate"] == 0.011
    text = (folder / "mine.yaml").read_text()
    assert all(word in text for word in ("# Needs:", "# Run:", "# Change:", "epochs: 1  # as you asked"))
    recipe = load_recipe(folder / "mine.yaml")
    assert (recipe.model, recipe.data.path, recipe.name) == (str(tiny_path), str(data), "mine")
    trained = run("train", "mine.yaml", "--json")
    assert trained.code == 0, trained.err
    assert trained.json["iters"] == 6


def test_the_questions_of_a_terminal(
    run: Run, tiny_path: Path, data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ui, "asks", lambda: True)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{tiny_path}\n\n{data}\n\nBe: brief # now\n"))
    ran = run("init")
    assert ran.code == 0, ran.err
    values = yaml.safe_load((folder / f"{data.stem}.yaml").read_text())
    assert values["data"]["system"] == "Be: brief # now" and values["model"] == str(tiny_path)
    assert ran.err.count("Which data") == 2, "an empty answer without a default is asked again"
    assert ran.out.startswith(f"# {data.stem}: made by")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Which model: not answered\nhint: --model MODEL answers it"),
        (["--model", "MODEL"], "Which data, a file or a folder: not answered\nhint: --data PATH answers it"),
    ],
)
def test_what_nobody_can_be_asked_names_its_option(run: Run, tiny_path: Path, words: list[str], said: str) -> None:
    ran = run("init", "--yes", *(tiny_path if word == "MODEL" else word for word in words))
    assert ran.code == 1 and said in ran.err


def test_a_recipe_that_is_there_stays(run: Run, tiny_path: Path, data: Path, folder: Path) -> None:
    (folder / "mine.yaml").write_text("model: other\n")
    words = ("init", "--model", tiny_path, "--data", data, "--name", "mine", "--yes")
    assert run(*words).code == 1 and (folder / "mine.yaml").read_text() == "model: other\n"
    assert run(*words, "--force").code == 0


def test_a_base_without_a_template_gets_one_and_a_small_machine_a_smaller_recipe(
    run: Run, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = write_model(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    words: tuple[Any, ...] = ("init", "--model", bare, "--data", data, "--yes", "--json", "--force")
    assert run(*words).json["settings"]["data.template"] == "chatml"
    from mlx_lora.machine import limits

    needs = run(*words).json["plan"]["peak_memory_bytes"]
    for share in (0.4, 0.3, 0.2, 0.15, 0.1):  # what fits by smaller micro-batches alone needs no other recipe
        monkeypatch.setattr(limits, "limit_bytes", lambda share=share, **_: int(needs * share))
        made = run(*words)
        if "# to fit this machine's memory" in Path(made.json["out"]).read_text():
            assert made.json["plan"]["fits"]
            return
    pytest.fail("no recipe was made smaller")
