"""Commands with an adapter and without `--model`, away from the model; and adapters of one name in a chat."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ran
from tests.conftest import write_model

Run = Callable[..., Ran]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base of the test's own, somewhere."""
    return write_model(tmp_path / "models here" / "base")


@pytest.fixture
def mine(base: Path, data: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter called `mine`; the working directory is another one by now."""
    words = ["--data", data, "--name", "mine", "train.iters=1", "train.batch_size=2", "adapter.rank=2"]
    assert run("train", "--model", base, *words).code == 0
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")


@pytest.mark.real
@pytest.mark.usefixtures("mine")
def test_generate_with_an_adapter_without_or_away_from_its_model(
    run: Run, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So do eval, chat, fuse and adapters verify."""
    assert run("generate", "--adapter", "mine", "--prompt", "say 1 twice", "--max-tokens", 1).code == 0
    assert len(run("eval", "--adapter", "mine", "--data", data, "--json").json["results"]) == 2
    assert run("fuse", "--adapter", "mine", "--out", tmp_path / "fused", "--data", data).code == 0
    assert "fits base" in run("adapters", "verify", "mine").out
    monkeypatch.setattr("sys.stdin", io.StringIO("/adapters\n"))
    assert "* mine" in run("chat", "--adapter", "mine").out

    base.rename(base.parent / "moved")
    lost = run("generate", "--adapter", "mine", "--prompt", "x")
    assert lost.code == 1 and "mine was trained over base" in lost.err and f"{base} is gone" in lost.err
    assert "--model MODEL" in lost.err
    unchecked = run("adapters", "verify", "mine")
    assert unchecked.code == 0 and "not checked" in unchecked.err and "fits" not in unchecked.out
    assert run("generate", "--adapter", "mine", "--model", base.parent / "moved", "--prompt", "x").code == 0


def test_without_model_and_adapter_the_model_is_asked_for(run: Run, data: Path) -> None:
    for words in (["generate", "--prompt", "x"], ["chat"], ["eval", "--data", data]):
        asked = run(*words)
        assert asked.code in (1, 2) and "--model" in asked.err


@pytest.mark.usefixtures("mine")
def test_use_means_the_homes_adapter_after_another_of_its_name_by_path(
    run: Run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "x" / "mine"
    shutil.copytree(home / "adapters" / "mine", elsewhere)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/use mine\n/adapters\n/use {elsewhere}\n/adapters\n"))
    ran = run("chat", "--adapter", elsewhere)
    first, second = ran.out.split("(base)")[:2]
    assert "* mine\n" in first and f"  {elsewhere}\n" in first
    assert "  mine\n" in second and f"* {elsewhere}\n" in second
