"""export: what is written, what is kept about it, and when nothing is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.interop import gate, hf
from mlx_lora.machine import limits
from mlx_lora.tasks import export_fused
from tests.cli.conftest import Ran

Run = Callable[..., Ran]


@pytest.fixture
def adapter(run: Run, tiny_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An adapter that changes what the tiny base says. Torch loads for seconds: transformers is for the real tests."""
    monkeypatch.setattr(hf, "transformers_here", lambda: False)
    done = run("train", "--model", tiny_path, "--data", data, "--name", "a", "train.iters=8", "train.learning_rate=0.1")
    assert done.code == 0, done.err
    return "a"


def test_what_was_exported_and_how_it_was_checked_lies_beside_it(run: Run, adapter: str, tmp_path: Path) -> None:
    ran = run("export", "hf", "--adapter", adapter, "--out", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    report, kept = json.loads(ran.out.splitlines()[-1]), json.loads((tmp_path / "out" / "export.json").read_text())
    assert report == {"out": str(tmp_path / "out")} | kept
    assert kept["check"]["program"] == "mlx_lm" and kept["check"]["kept"] == pytest.approx(1, abs=0.1)
    assert 0 <= kept["check"]["kl"] < kept["check"]["adapter_kl"]
    assert (tmp_path / "out" / "config.json").exists() and not (tmp_path / "out" / "model").exists()


@pytest.mark.real
def test_an_artefact_that_lost_the_adapter_is_not_written_unless_forced(
    run: Run, adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_fused, "check_in_transformers", of_the_base)
    ran = run("export", "hf", "--adapter", adapter, "--out", tmp_path / "out")
    assert ran.code == 1 and "0% of the adapter's effect" in ran.err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out.*"))
    forced = run("export", "hf", "--adapter", adapter, "--out", tmp_path / "out", "--force")
    assert forced.code == 0 and "0% of the adapter's effect" in forced.err and "as --force asks" in forced.err


def of_the_base(folder: Path, before: Any) -> gate.Checked:
    """The check as it would be if the written model were the base."""
    return gate.check("mlx_lm", before.live, before.base, before.base)


def test_a_model_too_large_to_run_is_written_and_said_to_be_unchecked(
    run: Run, adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "too_large", lambda size: "its weights take 13 GB, and 8 are free")
    ran = run("export", "hf", "--adapter", adapter, "--out", tmp_path / "out")
    assert ran.code == 0 and "not checked: its weights take 13 GB" in ran.err
    assert json.loads((tmp_path / "out" / "export.json").read_text())["unchecked"]


@pytest.mark.parametrize("words", [("--out", "{taken}"), ("--adapter", "nobody"), ("--model", "nowhere")])
def test_nothing_is_written_where_something_is_wrong(
    run: Run, adapter: str, tmp_path: Path, words: tuple[str, str]
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    chosen = {"--adapter": adapter, "--out": str(tmp_path / "out")} | {words[0]: words[1].format(taken=taken)}
    ran = run("export", "hf", *(word for pair in chosen.items() for word in pair))
    assert ran.code == 1 and "error:" in ran.err
    assert not (tmp_path / "out").exists() and not list(taken.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ("export", "hf"), ("export", "ollama"), ("export", "lmstudio"), ("fuse",),
        ("adapters", "export", "--to", "peft"), ("adapters", "export", "--to", "mlx-lm"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("source", ["base", "adapter"])
def test_force_never_replaces_what_is_exported(
    run: Run, adapter: str, tiny_path: Path, tmp_path: Path, words: tuple[str, ...], source: str
) -> None:
    """A directory that holds a model or an adapter may be replaced, but not by what is made of it."""
    base, copy = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny_path, base)
    shutil.copytree(tmp_path / "home" / "adapters" / adapter, copy)
    before = sorted(file.name for file in (tmp_path / source).iterdir())
    named = (copy,) if words[0] == "adapters" else ("--adapter", copy)
    for out in (tmp_path / source, tmp_path / source / "inside"):
        ran = run(*words, *named, "--model", base, "--out", out, "--force")
        assert ran.code == 1 and f"the {'model' if source == 'base' else 'adapter'} itself" in ran.err
    assert sorted(file.name for file in (tmp_path / source).iterdir()) == before
