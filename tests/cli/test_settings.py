"""Settings on the command line: as familiar options, and listed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_lora import settings as known
from tests.cli.conftest import Ran

Run = Callable[..., Ran]


@pytest.mark.parametrize("form", ["options", "options with =", "words"])
def test_familiar_options_set_what_they_mean(
    run: Run, data: Path, tiny_path: Path, home: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--lr`, `--epochs`, `--rank` and others reach the recipe, each with a note of what it became."""
    given = {"lr": "1e-3", "learning-rate": "2e-3", "rank": "3", "epochs": "2", "batch-size": "5", "iters": "1"}
    meant = ["train.learning_rate=2e-3", "adapter.rank=3", "train.epochs=2", "train.batch_size=5", "train.iters=1"]
    if form == "words":
        words = [f"{name.replace('-', '_')}={value}" for name, value in given.items()]
    elif form == "options":
        words = [part for name, value in given.items() for part in (f"--{name}", value)]
    else:
        words = [f"--{name}={value}" for name, value in given.items()]
    ran = run("train", *words, "--model", tiny_path, "--data", data, "--name", "mine", "--json")
    assert ran.code == 0, ran.err
    recipe = run("adapters", "show", "mine", "--json").json["recipe"]
    assert recipe["adapter"]["rank"] == 3
    wanted = {"learning_rate": 2e-3, "epochs": 2, "batch_size": 5, "iters": 1}
    assert {key: recipe["train"][key] for key in wanted} == wanted
    for line in meant:
        assert line in ran.err


def test_an_options_value_is_never_taken_for_an_option(run: Run) -> None:
    ran = run("train", "--name", "--lr", "--model", "nowhere", "--data", "nowhere")
    assert ran.code == 1 and "learning_rate" not in ran.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--lr",), 2, "--lr needs a value: train.learning_rate=…"),
        (("--steps", 5), 1, "it may mean train.iters or train.eval_every or train.save_every"),
        (("--nonsense", 5), 2, "No such option: --nonsense"),
        (("lr=x",), 1, "train.learning_rate: 'x' is refused"),
    ],
)
def test_options_that_set_nothing(run: Run, words: tuple[Any, ...], code: int, said: str) -> None:
    for command in ("train", "plan"):
        ran = run(command, "seed=1", *words)
        assert ran.code == code and said in ran.err and "glora" not in ran.err


def test_settings_lists_every_key(run: Run) -> None:
    listed = run("settings", "--json").json
    assert [setting["key"] for setting in listed] == list(known.fields())
    assert all(setting.keys() == {"key", "default", "allowed", "meaning"} for setting in listed)
    printed = run("settings").out
    assert all(key in printed for key in known.fields())


@pytest.mark.parametrize(
    ("word", "keys"),
    [("lr", ["train.learning_rate"]), ("adalora", ["adapter.target_rank", "adapter.prune_from", "adapter.prune_until",
     "adapter.prune_every", "adapter.orthogonal"]), ("grad", ["train.grad_accumulation", "train.max_grad_norm",
     "train.grad_checkpoint"])],
)  # fmt: skip
def test_settings_by_a_word(run: Run, word: str, keys: list[str]) -> None:
    assert [setting["key"] for setting in run("settings", word, "--json").json] == keys


def test_a_setting_that_is_not_there(run: Run) -> None:
    ran = run("settings", "rnak")
    assert ran.code == 1 and "no setting 'rnak'; did you mean 'rank'?" in ran.err


def test_help_of_train_lists_every_setting_with_its_default(run: Run) -> None:
    printed = run("train", "--help").out
    for setting in known.settings():
        assert f"  {setting.key}=" in printed
        assert setting.meaning.split()[0] in printed
    assert "train.learning_rate=auto" in printed


def test_the_version_is_told(run: Run) -> None:
    from mlx_lora import __version__

    ran = run("--version")
    assert (ran.code, ran.out) == (0, f"mlx-lora {__version__}\n")
