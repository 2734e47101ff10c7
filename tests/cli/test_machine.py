"""doctor and selftest: the JSON that programs rely on, tables for people, and an exit code that tells."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_lora import paths
from mlx_lora.models.load import LoadedModel
from mlx_lora.tasks import selftest, subject
from tests.cli.conftest import Ran

Run = Callable[..., Ran]


def test_doctor_says_what_the_home_holds(trained: Ran, run: Run, home: Path, tiny_path: Path) -> None:
    assert run("quantize", tiny_path, home / "models" / "q").code == 0
    sizes = run("doctor", "--json").json["home"]
    assert sizes == {
        "path": str(home),
        **{f"{kind}_bytes": paths.directory_bytes(home / kind) for kind in ("models", "adapters", "runs")},
        "total_bytes": paths.directory_bytes(home),
    }
    assert all(sizes[key] > 0 for key in sizes if key != "path")
    shown = run("doctor").out
    assert re.search(rf"^home +path {re.escape(str(home))}, models [\d.]+ kB, adapters [\d.]+ kB, runs ", shown, re.M)


def test_adapters_list_shows_sizes_in_units_for_people(trained: Ran, run: Run) -> None:
    assert re.search(r"\b[\d.]+ kB\b", run("adapters", "list").out)


@pytest.mark.real
def test_selftest_passes_here_and_says_where(run: Run, home: Path) -> None:
    ran = run("selftest", "--json")
    assert ran.code == 0 and ran.json["passed"] and ran.json["seconds"] > 0
    assert ran.json.keys() >= {"version", "system", "device", "name", "packages", "lines"}
    assert all(line.keys() >= {"name", "difference", "tolerance", "passed"} for line in ran.json["lines"])
    named = " ".join(line["name"] for line in ran.json["lines"])
    plain = ("forward", "gradient", "affine 3", "mxfp8 8", "nvfp4 4", "20 steps", "swap", "fuse")
    single = ("products", "attention", "delta rule", "packed rows", "in bfloat16", "ahead", "counted memory", "limits")
    for word in (*plain, *single):
        assert word in named
    assert "training" in ran.err, "it says what it is at"
    assert str(home) not in ran.out, "it is made to be sent"


def test_selftest_that_fails_says_which_and_exits_with_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def altered(loaded: LoadedModel) -> LoadedModel:
        loaded.model.model.norm.weight = loaded.model.model.norm.weight * 1.01
        return original(loaded)

    original = subject.ready
    monkeypatch.setattr(subject, "ready", altered)
    monkeypatch.setattr(selftest, "PARTS", {"base": selftest.PARTS["base"]})
    ran = run("selftest")
    rows = {line.split("  ")[0]: line for line in ran.out.splitlines() if "float32: " in line}
    assert ran.code == 1 and "1 of 2 checks failed" in ran.err
    assert rows["cpu float32: forward"].endswith("FAILED")
    assert rows["cpu float32: tensors of the base"].endswith("passed")
