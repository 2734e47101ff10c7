"""`study compare`: a table and JSON, lines that are kept, a run that fails, a broken-off run that alone is lost."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_lora import paths
from mlx_lora.tasks import compare as task
from tests.cli.conftest import Ran

KEYS = {
    "recipe", "method", "learning_rate", "parameters", "valid_loss", "loss", "exact_match", "seconds",
    "peak_memory_bytes", "adapter_bytes", "adapter", "error",
}  # fmt: skip
Run = Callable[..., Ran]


@pytest.fixture
def recipes(tmp_path: Path, data: Path, tiny_path: Path) -> Path:
    """A folder of two recipes, of rank 1 and 4, on the tiny model."""
    folder = tmp_path / "both"
    folder.mkdir()
    for rank in (1, 4):
        values: dict[str, Any] = {
            "model": str(tiny_path), "data": {"path": str(data)}, "adapter": {"rank": rank},
            "train": {"iters": 2, "batch_size": 4, "learning_rate": 0.01},
        }  # fmt: skip
        (folder / f"r{rank}.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that are trained from here on."""
    names: list[str] = []
    real = task.train_adapter

    def train_adapter(recipe: Any, **options: Any) -> Any:
        names.append(recipe.name)
        return real(recipe, **options)

    monkeypatch.setattr(task, "train_adapter", train_adapter)
    return names


def test_json_has_a_line_for_the_base_and_for_every_recipe(run: Run, recipes: Path) -> None:
    ran = run("study", "compare", recipes, "--rows", 3, "--json")
    assert ran.code == 0, ran.err
    base, r1, r4 = ran.json["results"]
    assert ran.json["name"] == "both" and base.keys() == r1.keys() == KEYS
    assert base["recipe"] == "(base)" and base["parameters"] == 0 and base["loss"] > 0
    assert (r1["recipe"], r4["recipe"]) == ("r1", "r4") and r4["parameters"] == 4 * r1["parameters"] > 0
    assert r1["loss"] != base["loss"] and 0 <= r1["exact_match"] <= 1 and r1["seconds"] > 0
    assert r1["adapter_bytes"] == (paths.room("adapters", "both-r1") / "adapters.safetensors").stat().st_size
    assert json.loads(Path(ran.json["file"]).read_text())["runs"]["r4"]["line"] == r4
    if ran.json["plot"]:
        assert Path(ran.json["plot"]).read_bytes().startswith(b"\x89PNG")
    assert all(file.stat().st_mode & 0o077 == 0 for file in Path(ran.json["file"]).parent.iterdir())


@pytest.mark.real
def test_people_get_a_table_and_what_won(run: Run, recipes: Path, tmp_path: Path) -> None:
    ran = run("study", "compare", recipes, "--rows", 3, "--out", tmp_path / "out", "--learning-rate", 0.01,
              "--learning-rate", 1e-6, "--name", "rates")  # fmt: skip
    assert ran.code == 0 and "lowest loss: r" in ran.out and "exact match" in ran.out
    assert ran.out.count(" 0.01 ") == 2  # validation has chosen it over a rate that learns nothing
    runs = json.loads((tmp_path / "out" / "comparison.json").read_text())["runs"]
    assert {"r1-lr0.01", "r1-lr1e-06", "r4-lr0.01", "r4-lr1e-06"} < runs.keys()


@pytest.mark.real
def test_what_is_done_is_kept_and_what_has_changed_is_done_again(
    run: Run, recipes: Path, data: Path, trained: list[str]
) -> None:
    words = ("study", "compare", recipes, "--rows", 3, "--json")
    first = run(*words).json["results"]
    assert trained == ["both-r1", "both-r4"]
    assert run(*words).json["results"] == first and len(trained) == 2
    file = recipes / "r4.yaml"
    file.write_text(file.read_text().replace("rank: 4", "rank: 2"))
    assert run(*words).json["results"][2]["parameters"] == first[2]["parameters"] / 2
    assert trained[2:] == ["both-r4"]
    (data / "test.jsonl").write_text((data / "valid.jsonl").read_text())
    assert run(*words).json["results"][0]["loss"] != first[0]["loss"] and not trained[3:]  # only measured anew
    (data / "train.jsonl").write_text((data / "valid.jsonl").read_text())
    assert run(*words).code == 0 and trained[3:] == ["both-r1", "both-r4"]


@pytest.mark.parametrize(
    ("during", "again"), [("training", ["both-r4"]), pytest.param("measuring", [], marks=pytest.mark.real)]
)
def test_ctrl_c_loses_only_the_run_it_stops(
    run: Run, recipes: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch, during: str, again: list[str]
) -> None:
    """A training that is asked to stop ends with what it has; a measurement is over at once."""
    words = ("study", "compare", recipes, "--rows", 3, "--json")
    train, evaluate = task.train_adapter, task._evaluate

    def stopped(recipe: Any, **options: Any) -> Any:
        result = train(recipe, **options)
        by = "interrupted" if recipe.name == "both-r4" else "iters"
        return replace(result, finished=replace(result.finished, stopped_by=by))

    def broken_off(ran: Any, *rest: Any) -> Any:
        if ran.name == "r4":
            signal.raise_signal(signal.SIGINT)  # nobody may catch it for a training that is over
        return evaluate(ran, *rest)

    with monkeypatch.context() as patch:
        if during == "training":
            patch.setattr(task, "train_adapter", stopped)
        else:
            patch.setattr(task, "_evaluate", broken_off)
        ran = run(*words)
    assert ran.code == 130 and "the same command goes on" in ran.err and not ran.out
    assert trained == ["both-r1", "both-r4"]
    assert run(*words).code == 0 and trained == ["both-r1", "both-r4", *again]


@pytest.mark.real
def test_a_recipe_that_fails_leaves_the_others_alone(run: Run, recipes: Path, trained: list[str]) -> None:
    file = recipes / "r1.yaml"
    file.write_text(file.read_text().replace("rank: 1", "targets: [no_such]"))
    ran = run("study", "compare", recipes, "--rows", 3, "--json")
    assert ran.code == 1 and "r1: no module is called 'no_such'" in ran.err
    errors = {line["recipe"]: line["error"] for line in ran.json["results"]}
    assert errors["r1"] and errors["r4"] is None


def test_an_adapter_of_somebody_elses_is_not_replaced(run: Run, recipes: Path, trained: list[str]) -> None:
    (paths.home() / "adapters" / "both-r1").mkdir(parents=True)
    ran = run("study", "compare", recipes, "--rows", 3)
    assert ran.code == 1 and "'both-r1' exists" in ran.err and not trained
    assert run("study", "compare", recipes / "r1.yaml", "--name", "both", "--rows", 3, "--force").code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "Missing argument"),
        (("train.iters=3",), "nothing to compare"),
        (("no-such",), "no such recipe"),
        (("methods", "train.iter=3"), "train.iters"),
    ],
)
def test_bad_input_is_one_line(run: Run, words: tuple[str, ...], says: str) -> None:
    ran = run("study", "compare", *words)
    assert ran.code in (1, 2) and says in ran.err


def test_without_test_rows_there_is_nothing_to_judge_by(run: Run, recipes: Path, data: Path) -> None:
    (data / "test.jsonl").unlink()
    ran = run("study", "compare", recipes)
    assert ran.code == 1 and "has no test file" in ran.err


def test_a_folder_that_holds_something_else_is_left_alone(run: Run, recipes: Path, tmp_path: Path) -> None:
    ran = run("study", "compare", recipes, "--out", tmp_path)
    assert ran.code == 1 and "holds something else" in ran.err
