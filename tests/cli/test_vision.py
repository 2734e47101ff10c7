"""Shows 5: Fused Qwen3.5-like and Gemma 3-like vision directory, tiny and random: vision tensors byte-identical,
mlx_vlm loads it and its text logits equal ours. (tests/real/test_vision_mlx_vlm.py has mlx_vlm's half.)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest

from mlx_lora import files
from mlx_lora.adapters.attach import put
from mlx_lora.errors import ModelError
from mlx_lora.models.architectures import BESIDE_TEXT
from mlx_lora.models.load import load
from mlx_lora.models.open import weight_files
from mlx_lora.store import adapter as store
from mlx_lora.store import registry
from tests.cli.conftest import Ran
from tests.vision import PROCESSORS, WRITERS

Run = Callable[..., Ran]
TOKENS = mx.array([[5, 9, 70, 2, 33, 11, 8, 100, 7, 6]])
SMALL = ("train.iters=3", "train.batch_size=2", "train.learning_rate=0.01", "adapter.rank=4",
         "adapter.targets=[q_proj,v_proj]", "--json")  # fmt: skip


def parts(path: Path, architecture: str) -> dict[str, tuple[str, list[int], bytes]]:
    """Vision tensors of a directory by name: type, shape and bytes, as its files hold them."""
    return {
        tensor.name: (tensor.dtype, tensor.shape, b"".join(files.tensor_bytes(tensor, ModelError)))
        for file in weight_files(path)
        for tensor in files.tensors(file, ModelError)
        if tensor.name.startswith(BESIDE_TEXT[architecture])
    }


@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=() if name == "gemma3" else pytest.mark.real) for name in WRITERS]
)
def test_vision_survives_quantizing_training_and_fusing(
    run: Run, tmp_path: Path, data: Path, architecture: str
) -> None:
    source, packed, fused = (tmp_path / name for name in ("source", "packed", "fused"))
    WRITERS[architecture](source)
    vision = parts(source, architecture)
    assert {kind for kind, _, _ in vision.values()} == {"BF16", "F32"}
    stale = ["mtp."] if architecture == "qwen3_5" else []

    report = run("quantize", source, packed, "--group-size", 32, "--json").json
    assert report["carried"]["vision"] == len(vision) and report["carried"]["stale"] == stale
    assert {"model-vision.safetensors", *PROCESSORS} <= set(report["carried"]["files"])
    assert run("train", "--model", packed, "--data", data, "--name", "mine", *SMALL).code == 0
    ran = run("fuse", "--model", packed, "--adapter", "mine", "--out", fused)
    assert ran.code == 0, ran.err
    assert f"carried along unchanged: {len(vision)} vision tensors; model-vision.safetensors" in ran.out

    for directory in (packed, fused):
        assert parts(directory, architecture) == vision
        assert all((directory / name).read_bytes() == (source / name).read_bytes() for name in PROCESSORS)
        config = json.loads((directory / "config.json").read_text())
        assert config["vision_config"] == json.loads((source / "config.json").read_text())["vision_config"]
        index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
        held = {tensor.name: f.name for f in weight_files(directory) for tensor in files.tensors(f, ModelError)}
        assert index == held and not any("mtp." in name for name in held)

    with_adapter = load(packed).model
    put(with_adapter, store.wrappers_for(with_adapter, store.read(registry.find("mine"))))
    theirs, _ = mlx_lm.utils.load(str(fused))
    theirs.set_dtype(mx.float32)
    expected, ours = (np.array(model(TOKENS)) for model in (with_adapter, load(fused).model))
    assert np.abs(ours - expected).mean() < 0.05, "the touched layers are stored in eight bits, the others as they were"
    np.testing.assert_allclose(np.array(theirs(TOKENS)), ours, atol=1e-4)


@pytest.mark.real
@pytest.mark.parametrize("architecture", WRITERS)
def test_a_base_is_known_by_its_text_alone(run: Run, tmp_path: Path, data: Path, architecture: str) -> None:
    """An adapter trained while its base was quantized on loading goes with the directory that `quantize` writes."""
    source, packed = WRITERS[architecture](tmp_path / "source"), tmp_path / "packed"
    words = ("--name", "mine", *SMALL, "quantize.bits=4", "quantize.group_size=32")
    assert run("train", "--model", source, "--data", data, *words).code == 0
    ran = run("quantize", source, packed, "--bits", 4, "--group-size", 32)
    assert ran.code == 0 and "vision tensors; model-vision.safetensors" in ran.out
    assert ("left out, stale once the model has changed: mtp." in ran.out) == (architecture == "qwen3_5")
    for model in (source, packed):
        ran = run("generate", "--model", model, "--adapter", "mine", "--prompt", "a", "--max-tokens", 2)
        assert ran.code == 0, ran.err
