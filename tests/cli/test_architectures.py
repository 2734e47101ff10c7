"""Architectures that people load today, through the defaults of the command line: train, eval, fuse, eval once more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Ran
from tests.models.tiny import mixed, plain
from tests.models.tiny.directory import write_directory

CONFIGS: dict[str, dict[str, Any]] = {**plain.CONFIGS, **mixed.CONFIGS}
BY_DEFAULT = ("qwen3_5",)
NAMES = (
    "qwen3_5", "qwen3_next", "nemotron_h", "lfm2", "granitemoehybrid", "kimi_linear", "deepseek_v3", "gpt_oss",
    "gemma3n",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.real) for name in NAMES]
)
def test_train_eval_fuse_and_eval_of_the_fused_model(
    name: str, run: Callable[..., Ran], data: Path, tmp_path: Path
) -> None:
    base = write_directory(tmp_path / name, name, CONFIGS[name], packed_experts=name == "gpt_oss")
    words = ("--json", "train.learning_rate=5e-3", "train.epochs=1", "train.eval_every=null")
    trained = run("train", "--model", base, "--data", data, "--name", "mine", *words)
    assert trained.code == 0, trained.err
    before, after = run("eval", "--model", base, "--adapter", "mine", "--data", data, "--json").json["results"]
    assert after["loss"] < before["loss"] - 0.05
    assert after["loss"] == pytest.approx(trained.json["valid_loss"], rel=0.3)
    fused = run("fuse", "--model", base, "--adapter", "mine", "--out", tmp_path / "fused", "--json")
    assert fused.code == 0, fused.err
    assert fused.json["delta_survival"] > 0.9 and fused.json["kl"] < 0.02
    (alone,) = run("eval", "--model", tmp_path / "fused", "--data", data, "--json").json["results"]
    assert alone["loss"] == pytest.approx(after["loss"], rel=0.02)
