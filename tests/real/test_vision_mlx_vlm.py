"""Shows 5: Fused Qwen3.5-like and Gemma 3-like vision directory, tiny and random: vision tensors byte-identical,
mlx_vlm loads it and its text logits equal ours.

mlx-vlm lives in a virtual environment of its own, made once beside the other downloads: it asks for other versions of
what this project stands on. That the bytes are the same is tests/cli/test_vision.py's; here both directories also see
the same in a picture.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.models.load import load
from tests.conftest import questions
from tests.real.conftest import Shell
from tests.vision import WRITERS

pytestmark = pytest.mark.real

MLX_VLM, MLX = "mlx-vlm==0.7.10", "mlx==0.32.4" if sys.platform == "darwin" else "mlx[cpu]==0.32.4"
TOKENS = [[5, 9, 70, 2, 33, 11, 8, 100, 7, 6]]
# Prints nothing; leaves the logits of TOKENS, and what the vision tower makes of a picture of noise, beside each other.
SCRIPT = """
import sys
from pathlib import Path
import mlx.core as mx
from mlx_vlm.utils import load_model

tokens, out, path = mx.array(eval(sys.argv[1])), sys.argv[2], Path(sys.argv[3])
model = load_model(path, lazy=True)
model.set_dtype(mx.float32)
noise = mx.random.normal((16, 96), key=mx.random.key(0))
if model.config.model_type == "gemma3":
    picture = noise.reshape(1, 16, 32, 3)[:, :, :16]
    seen = model.multi_modal_projector(model.vision_tower(picture, output_hidden_states=True)[0])
else:
    seen = model.vision_tower(noise, mx.array([[1, 4, 4]]))
    seen = seen[0] if isinstance(seen, tuple) else seen
mx.savez(out, logits=model.language_model(tokens).logits, seen=seen)
"""


@pytest.fixture(scope="session")
def mlx_vlm(cache: Path) -> Path:
    """The Python of an environment with mlx-vlm."""
    folder = cache / MLX_VLM.replace("==", "-")
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", MLX_VLM, MLX], check=True)
        (folder / "complete").touch()
    return python


def theirs(python: Path, path: Path, out: Path) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    command = [str(python), "-c", SCRIPT, str(TOKENS), str(out), str(path)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "no weights for module" not in done.stderr, "the vision tower was switched off"
    return dict(np.load(out))


@pytest.mark.parametrize("bits", ["plain", "four"])
@pytest.mark.parametrize("architecture", WRITERS)
def test_mlx_vlm_reads_what_is_fused(
    shell: Shell, mlx_vlm: Path, tmp_path: Path, write_rows: Callable[..., Path], architecture: str, bits: str
) -> None:
    source, fused = WRITERS[architecture](tmp_path / "source"), tmp_path / "fused"
    base, name = source, f"{architecture}-{bits}"
    if bits == "four":
        base = tmp_path / "packed"
        shell.json("quantize", source, base, "--group-size", 32)
    shell.json(
        "train", "--model", base, "--data", write_rows(questions(24)), "--name", name, "train.iters=3",
        "train.learning_rate=0.01", "adapter.rank=4", "adapter.targets=[q_proj,v_proj]",
    )  # fmt: skip
    report = shell.json("fuse", "--model", base, "--adapter", name, "--out", fused, "--force")
    assert report["carried"]["vision"]
    before, after = (theirs(mlx_vlm, path, tmp_path / f"{path.name}.npz") for path in (source, fused))
    ours = {path.name: np.array(load(path).model(mx.array(TOKENS))) for path in (source, fused)}
    print(f"{name}: text logits off by {np.abs(after['logits'] - ours['fused']).max():.1e}")
    np.testing.assert_allclose(after["logits"], ours["fused"], atol=1e-3)
    np.testing.assert_allclose(before["logits"], ours["source"], atol=1e-3)
    assert np.abs(ours["fused"] - ours["source"]).max() > 1e-2, "the adapter has changed nothing"
    np.testing.assert_array_equal(after["seen"], before["seen"])
