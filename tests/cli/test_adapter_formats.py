"""adapters import and export on the command line: what they print, and where what they write is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.interop import hf, mlx_lm
from tests.cli.conftest import Ran

Run = Callable[..., Ran]
NO_TORCH = "PEFT isn't there to run it: pip install peft torch"


@pytest.fixture(autouse=True)
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT runs in the real tests: torch loads for seconds."""
    monkeypatch.setattr(hf, "transformers_here", lambda: False)


@pytest.mark.real
def test_mlx_lm_runs_what_was_written_and_the_record_says_so(
    run: Run, trained: Ran, tiny_path: Path, tmp_path: Path
) -> None:
    words = ["adapters", "export", "mine", "--to", "mlx-lm", "--model", tiny_path]
    report = run(*words, "--out", tmp_path / "out", "--json").json
    check = report["check"]
    assert check["program"] == "mlx_lm" and check["kept"] == pytest.approx(1, abs=0.05)
    assert check["kl"] < 1e-4 < check["adapter_kl"]
    assert json.loads((tmp_path / "out" / "export.json").read_text())["check"] == check
    assert "mlx_lm, at" in (tmp_path / "out" / "README.md").read_text()
    unasked = run(*words, "--out", tmp_path / "quick", "--data", "none", "--json").json
    assert unasked["check"] is None and unasked["unchecked"] == "not asked for"


@pytest.mark.real
def test_an_adapter_that_mlx_lm_would_scale_otherwise_is_not_written(
    run: Run, trained: Ran, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault that other converters have: a scale of the configuration that isn't the trained one."""
    written = mlx_lm.write

    def stronger(*arguments: Any, **named: Any) -> Path:
        out = written(*arguments, **named)
        config = json.loads((out / "adapter_config.json").read_text())
        config["lora_parameters"]["scale"] *= 4
        (out / "adapter_config.json").write_text(json.dumps(config))
        return out

    monkeypatch.setattr(mlx_lm, "write", stronger)
    words = ["adapters", "export", "mine", "--to", "mlx-lm", "--model", tiny_path, "--out", tmp_path / "out"]
    ran = run(*words)
    assert ran.code == 1 and "of the adapter's effect is in the exported model" in ran.err
    assert not (tmp_path / "out").exists() and run(*words, "--force").code == 0


def test_an_adapter_goes_out_to_peft_and_comes_back(run: Run, trained: Ran, tiny_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "peft"
    ran = run("adapters", "export", "mine", "--to", "peft", "--out", out, "--model", tiny_path, "--json")
    assert ran.code == 0, ran.err
    assert ran.json == {
        "out": str(out), "format": "peft", "method": "lora", "rank": 4, "modules": 12, "relative_error": 0.0,
        "bytes": sum(file.stat().st_size for file in out.iterdir()), "check": None, "unchecked": NO_TORCH,
    }  # fmt: skip
    back = run("adapters", "import", out, "--name", "back", "--model", tiny_path, "--json")
    assert back.code == 0, back.err
    assert back.json.keys() == {"adapter", "name", "format", "method", "rank", "modules", "base", "bytes"}
    assert (back.json["format"], back.json["name"], back.json["base"]) == ("peft", "back", "tiny")
    assert [entry["name"] for entry in run("adapters", "list", "--json").json] == ["back", "mine"]
    assert "lora" in run("adapters", "show", "back").out
    assert run("adapters", "verify", "back", "--model", tiny_path).code == 0
    said = [
        run("generate", "--model", tiny_path, "--adapter", name, "--prompt", "say 1 twice", "--max-tokens", 6).out
        for name in ("mine", "back")
    ]
    assert said[0] == said[1]


@pytest.mark.real
def test_the_nearest_lora_is_written_with_its_error(run: Run, trained: Ran, tiny_path: Path, tmp_path: Path) -> None:
    words = ["adapters", "export", "mine", "--to", "mlx-lm", "--model", tiny_path]
    ran = run(*words, "--out", tmp_path / "two", "--as-lora", 2)
    assert ran.code == 0 and "lora, rank 2 on 12 modules" in ran.out and "relative error 0." in ran.out
    ran = run(*words, "--out", tmp_path / "four", "--as-lora", 4)
    assert ran.code == 0 and ran.out.splitlines()[0].endswith("relative error 0")


def test_mistakes_are_one_line_and_a_hint(run: Run, trained: Ran, tiny_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["adapters", "export", "mine", "--out", out, "--model", tiny_path]
    assert run(*words, "--to", "onnx").code == 2
    assert run(*words, "--to", "mlx-lm").code == 0
    again = run(*words, "--to", "mlx-lm")
    assert again.code == 1 and f"{out} exists" in again.err and "--force" in again.err
    taken = run("adapters", "import", out, "--name", "mine", "--model", tiny_path)
    assert taken.code == 1 and "an adapter 'mine' exists" in taken.err
    missing = run("adapters", "import", tmp_path / "nowhere", "--name", "new", "--model", tiny_path)
    assert missing.code == 1 and "doesn't exist" in missing.err
    above = run("adapters", "import", tmp_path, "--name", "new", "--model", tiny_path)
    assert above.code == 1 and "no adapter_config.json" in above.err and "it is in one of: out" in above.err
