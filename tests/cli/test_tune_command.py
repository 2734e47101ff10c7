"""`tune`: a recipe with reasons, what the default would have lost, and a record that goes on where it ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_lora import paths, ui
from mlx_lora.recipe import load_recipe
from mlx_lora.study.trials import Trial
from mlx_lora.tasks import tune as task
from mlx_lora.tasks.trial import Bench
from mlx_lora.train.events import Step
from tests.cli.conftest import Ran

Run = Callable[..., Ran]
KEYS = {
    "name", "file", "recipe", "settings", "steps", "best_step", "valid_loss", "default", "lost", "rows", "trials",
    "left_out", "seconds", "out",
}  # fmt: skip
RATES = ("train.iters=2", "train.batch_size=4", "adapter.rank=4", "adapter.targets=attention")
RANK = ("train.iters=2", "train.batch_size=4", "adapter.targets=attention", "train.learning_rate=0.01")


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[Trial]:
    """The trials that are trained from here on."""
    trials: list[Trial] = []
    real = Bench.run

    def run(self: Bench, trial: Trial, looks: int, until: float) -> Any:
        trials.append(trial)
        return real(self, trial, looks, until)

    monkeypatch.setattr(Bench, "run", run)
    return trials


@pytest.mark.real
def test_a_recipe_comes_out_that_training_takes(run: Run, data: Path, tiny_path: Path, tmp_path: Path) -> None:
    (data / "test.jsonl").write_text("not JSON, and never read")
    out = tmp_path / "tuned.yaml"
    ran = run("tune", "--model", tiny_path, "--data", data, "--name", "mine", "--out", out, "--json", *RATES)
    assert ran.code == 0, ran.err
    found = ran.json
    assert found.keys() == KEYS and found["name"] == "mine" and found["out"] == str(out)
    recipe = load_recipe(out)
    assert found["recipe"] == yaml.safe_load(out.read_text())
    assert recipe.train.learning_rate == found["settings"]["train.learning_rate"]
    best = min(trial["loss"] for trial in found["trials"])
    assert best <= found["valid_loss"] <= best + 0.01 and found["rows"] == 5
    rates = [trial["rate"] for trial in found["trials"]]
    assert len(set(rates)) == len(rates) >= 3
    assert (recipe.train.iters, recipe.adapter.rank, recipe.adapter.targets) == (2, 4, "attention")
    assert found["lost"]["nats"] >= 0 and found["left_out"] == []
    trained = run("train", out, "--json")
    assert trained.code == 0 and trained.json["valid_loss"] == pytest.approx(found["valid_loss"], rel=1e-4)


def test_people_get_the_recipe_with_its_reasons(run: Run, data: Path, tiny_path: Path) -> None:
    ran = run("tune", "--model", tiny_path, "--data", data, *RANK)
    assert ran.code == 0, ran.err
    values = yaml.safe_load(ran.out)
    assert values["model"] == str(tiny_path) and values["name"] == "data" and values["adapter"]["rank"] in (8, 32)
    rank = next(line for line in ran.out.splitlines() if line.startswith("  rank: "))
    assert " nats a token" in rank and rank.partition("#")[2].split()[0] in ("8:", "32:")
    assert "learning_rate: 0.01  # as you asked" in ran.out
    assert "best: rate 0.01" in ran.err and "5 validation rows say little" in ran.err


def test_a_training_that_has_failed_leaves_no_bar_to_the_next(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[str] = []

    @contextmanager
    def bar(label: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
        bars.append(label)
        yield lambda count, text: None
        bars.remove(label)

    def failing(*_: Any, listener: Callable[[], Any], stage: Callable[[str], None], **__: Any) -> Any:
        for _ in range(2):
            stage("the next one")
            listener().event(Step(1, 2, 1.0, 1e-3, 1.0, 1, 1.0, 1, False))
            assert bars == ["training"]
        raise KeyboardInterrupt

    monkeypatch.setattr(ui, "bar", bar)
    monkeypatch.setattr(task, "tune", failing)
    assert run("tune", "--model", "x", "--data", "y").code == 130 and not bars


def test_the_name_is_that_of_the_folder_one_stands_in(
    run: Run, data: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data)
    assert "no directory 'x'" in run("tune", "--model", "x", "--data", ".").err


@pytest.mark.real
def test_the_same_command_goes_on_after_ctrl_c(
    run: Run, data: Path, tiny_path: Path, tried: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("tune", "--model", tiny_path, "--data", data, "--json", *RATES)
    real = Bench.run

    def stopped(self: Bench, trial: Trial, looks: int, until: float) -> Any:
        if len(tried) == 2:
            raise KeyboardInterrupt
        return real(self, trial, looks, until)

    with monkeypatch.context() as patch:
        patch.setattr(Bench, "run", stopped)
        ran = run(*words)
    assert ran.code == 130 and "the same command goes on" in ran.err and not ran.out
    first = list(tried)
    found = run(*words).json
    assert len(found["trials"]) == len(tried) == len(set(tried)) and tried[:2] == first
    assert run(*words).json["trials"] == found["trials"] and len(tried) == len(found["trials"])
    (data / "train.jsonl").write_text((data / "valid.jsonl").read_text())
    assert run(*words).code == 0 and len(tried) > len(found["trials"])


@pytest.mark.parametrize("damage", [{"trial": {"rate": 1.0}}, {"losses": 3}, [1]])
def test_a_damaged_record_says_what_to_do(
    run: Run, data: Path, tiny_path: Path, damage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = paths.room("tunings", "mine") / "tuning.json"
    monkeypatch.setattr(task, "made_of", lambda recipe: {})
    file.parent.mkdir(parents=True)
    entry = {"made_of": {"asked": sorted(word.partition("=")[0] for word in RANK)}, "line": damage}
    file.write_text(json.dumps({"runs": {"one": entry}}))
    ran = run("tune", "--model", tiny_path, "--data", data, "--name", "mine", *RANK)
    assert ran.code == 1 and "isn't a tuning's record" in ran.err and "remove it to begin again" in ran.err


@pytest.mark.real
def test_the_record_holds_numbers_and_is_the_users_alone(run: Run, data: Path, tiny_path: Path) -> None:
    ran = run("tune", "--model", tiny_path, "--data", data, "--name", "mine", "--json", *RANK)
    file = Path(ran.json["file"])
    assert file == paths.room("tunings", "mine") / "tuning.json"
    assert all(place.stat().st_mode & 0o077 == 0 for place in (file, file.parent, file.parent.parent))
    text = file.read_text()
    assert "say " not in text and str(data) not in text
    assert all(len(entry["line"]["losses"]) == 5 for entry in json.loads(text)["runs"].values())
    assert not (paths.home() / "adapters").exists() and not (paths.home() / "runs").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--data", "VALIDLESS", "data.valid_fraction=0"), "there are none"),
        (("--data", "DATA", *RANK, "adapter.rank=4"), "every setting that tuning could change is given"),
        (
            ("--data", "DATA", *RANK[:3], "train={learning_rate: 0.01, iters: 2}", "adapter.rank=4"),
            "every setting that",
        ),
        (("--data", "DATA", "--out", "DATA"), "exists"),
        (("--data", "DATA", "adapter.ranks=4"), "adapter.ranks"),
        (("--data", "DATA", "adapter.targets=[no_such]", *RATES[:2]), "no module is called 'no_such'"),
        ((), "Missing option '--data'"),
    ],
)
def test_bad_input_is_one_line(run: Run, data: Path, tiny_path: Path, words: tuple[str, ...], says: str) -> None:
    places = {"DATA": data, "VALIDLESS": data / "train.jsonl"}
    ran = run("tune", "--model", tiny_path, *(places.get(word, word) for word in words))
    assert ran.code in (1, 2) and says in ran.err, ran.err


def test_too_little_time_is_said_with_the_time_that_is_enough(
    run: Run, data: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Bench.run

    def slow(self: Bench, trial: Trial, looks: int, until: float) -> Any:
        line = real(self, trial, looks, float("inf"))
        return task.Line(line.trial, line.losses, 2, 2, 1, seconds=400.0, step_seconds=100.0, look_seconds=1.0)

    monkeypatch.setattr(Bench, "run", slow)
    ran = run("tune", "--model", tiny_path, "--data", data, "--minutes", 1, *RATES)
    assert ran.code == 1 and "1 minute is too short to compare two trainings" in ran.err
    assert "hint: --minutes 4" in ran.err
