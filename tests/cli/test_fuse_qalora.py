"""QA-LoRA over bfloat16 zero-points from the command line: trained, merged into 4 bits, and evaluated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_lora.machine import device
from tests.cli.conftest import Ran
from tests.conftest import write_model

Run = Callable[..., Ran]
SETTINGS = (
    "adapter.method=qalora", "quantize.bits=4", "quantize.group_size=32", "train.batch_size=4", "train.iters=4",
    "train.learning_rate=2e-4",
)  # fmt: skip


@pytest.fixture
def half(tmp_path: Path) -> Path:
    return write_model(tmp_path / "half", dtype=mx.bfloat16, num_hidden_layers=2)


def test_a_short_training_is_whole_in_the_merged_model(half: Path, data: Path, run: Run, tmp_path: Path) -> None:
    """At the default rate, after four steps: nothing that nearest rounding would keep."""
    assert run("train", "--model", half, "--data", data, "--name", "mine", *SETTINGS).code == 0
    base, live = run("eval", "--model", half, "--adapter", "mine", "--data", data, "--json").json["results"]
    assert live["loss"] < base["loss"]
    out = tmp_path / "fused"
    fused = run("fuse", "--adapter", "mine", "--out", out, "--bits", "keep", "--data", data, "--json")
    assert fused.code == 0, fused.err
    assert fused.json["delta_survival"] > 0.999 and fused.json["zero_points_bytes"] == 0
    (merged,) = run("eval", "--model", out, "--data", data, "--json").json["results"]
    assert merged["loss"] == pytest.approx(live["loss"], abs=1e-2 if device.on_gpu() else 1e-5)


def test_float32_zero_points_say_what_they_cost(half: Path, data: Path, run: Run, tmp_path: Path) -> None:
    words = ("train", "--model", half, "--data", data, "--name", "mine", *SETTINGS, "adapter.zero_points=float32")
    assert run(*words).code == 0
    fuse = ("fuse", "--adapter", "mine", "--out", tmp_path / "fused", "--data", data)
    refused = run(*fuse, "--bits", "keep")
    assert refused.code == 1 and "--zero-points float32" in refused.err
    fused = run(*fuse, "--zero-points", "float32")
    assert fused.code == 0, fused.err
    assert "zero-points and scales in float32 take" in fused.out and "mlx_lm computes in float32" in fused.out
