"""QA-LoRA on a real model with float16 zero-points: the model merged into 4 bits is what was trained."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest

from tests.real.conftest import Shell

pytestmark = pytest.mark.real

ROWS = 16
SETTINGS = ("data.template=none", "data.valid_fraction=0", "train.batch_size=2", "adapter.method=qalora")


@pytest.fixture(scope="module")
def published(shell: Shell, smollm2_gguf: Path) -> Path:
    """SmolLM2 as its file packs it: 4 bits in groups of 32, scales and zero-points in float16."""
    path = shell.home / "models" / "smollm2-published"
    shell.json("import-gguf", smollm2_gguf, path)
    return path


@pytest.fixture(scope="module")
def short(wikisql: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shortest rows of the task."""
    folder = tmp_path_factory.mktemp("short")
    for split, most in (("train", 120), ("test", ROWS)):
        lines = sorted((wikisql / f"{split}.jsonl").read_text().splitlines(keepends=True), key=len)
        (folder / f"{split}.jsonl").write_text("".join(lines[:most]))
    return folder


def arrays_of(path: Path) -> dict[str, mx.array]:
    arrays: dict[str, mx.array] = mx.load(str(path / "model.safetensors"))  # type: ignore[assignment]
    return arrays


@pytest.mark.parametrize("steps", [12, 60])
def test_merged_into_four_bits_it_is_what_was_trained(shell: Shell, published: Path, short: Path, steps: int) -> None:
    """The loss within 1e-4 on unseen rows, no packed byte changed, and mlx_lm loads it."""
    name, out = f"qalora-{steps}", shell.home / "models" / f"merged-{steps}"
    words = ("--model", published, "--data", short)
    shell.json("train", *words, "--name", name, *SETTINGS, f"train.iters={steps}")
    base, live = shell.json("eval", *words, "--adapter", name, SETTINGS[0])["results"]
    fused = shell.json("fuse", *words, "--adapter", name, "--out", out, "--bits", "keep")
    (merged,) = shell.json("eval", "--model", out, "--data", short, SETTINGS[0])["results"]
    print(f"\n{base['loss']:.5f} -> {live['loss']:.5f}, merged {merged['loss']:.5f}; {fused}")
    assert live["loss"] < base["loss"] - 0.01
    assert merged["loss"] == pytest.approx(live["loss"], abs=1e-4)
    assert fused["delta_survival"] > 0.999 and fused["kl"] < 1e-6
    before, after = arrays_of(published), arrays_of(out)
    assert before.keys() == after.keys()
    for key, array in before.items():
        assert after[key].dtype == array.dtype
        if not key.endswith(".biases"):
            assert mx.array_equal(array, after[key]), key
    model, _ = mlx_lm.utils.load(str(out))
    assert np.isfinite(np.array(model(mx.array([[1, 2, 3]])).astype(mx.float32))).all()


def test_trained_without_rounding_it_is_lost_but_for_float32(shell: Shell, published: Path, short: Path) -> None:
    words, out = ("--model", published, "--data", short), shell.home / "models" / "merged-wide"
    little = ("train.iters=12", "train.learning_rate=2e-4")  # less than what float16 can tell apart
    shell.json("train", *words, "--name", "unrounded", *SETTINGS, *little, "adapter.zero_points=float32")
    refused = shell("fuse", *words, "--adapter", "unrounded", "--out", out, "--bits", "keep")
    print(f"\n{refused.stderr}")
    assert refused.returncode and "% of the adapter's update survives" in refused.stderr and not out.exists()
    assert "--zero-points float32" in refused.stderr
    fused = shell.json("fuse", *words, "--adapter", "unrounded", "--out", out, "--zero-points", "float32")
    assert fused["delta_survival"] > 0.99 and fused["zero_points_bytes"] > 0
