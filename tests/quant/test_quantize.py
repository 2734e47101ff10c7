"""What quantizing a model reports, what it leaves alone, and that mlx_lm loads the result as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest

from mlx_lora.config import Quantize
from mlx_lora.errors import ModelError
from mlx_lora.machine import device
from mlx_lora.methods import MODES
from mlx_lora.models.load import load, load_stored
from mlx_lora.models.save import save
from mlx_lora.quant.quantize import dequantize_layer, is_quantized, layer_settings, parameter_count, quantize
from tests.adapters.zoo import network
from tests.conftest import write_model

SETTINGS = [(mode, bits, group) for mode, (widths, groups) in MODES.items() for bits in widths for group in groups[:1]]
TOKENS = mx.array([[5, 9, 70, 2, 33, 11, 8]])


def settings_of(mode: str = "affine", bits: int = 4, group_size: int = 64) -> dict[str, Any]:
    return {"mode": mode, "bits": bits, "group_size": group_size}


class Layers(nn.Module):
    """One layer of each kind, nothing else: sizes are easy to say."""

    def __init__(self, dtype: mx.Dtype = mx.float16):
        super().__init__()
        self.embed = nn.Embedding(64, 128)
        self.first = nn.Linear(128, 64, bias=False)
        self.set_dtype(dtype)


@pytest.mark.parametrize(("mode", "bits", "group_size"), SETTINGS)
def test_relative_error_and_bits_per_weight_are_what_numpy_says(mode: str, bits: int, group_size: int) -> None:
    model = Layers()
    before = [np.array(layer.weight, np.float64) for layer in (model.embed, model.first)]
    report = quantize(model, settings_of(mode, bits, group_size))
    after = [np.array(dequantize_layer(layer, mx.float32), np.float64) for layer in (model.embed, model.first)]
    lost = sum(np.square(a - b).sum() for a, b in zip(before, after, strict=True))
    expected = np.sqrt(lost / sum(np.square(a).sum() for a in before))
    assert report.relative_error == pytest.approx(expected, rel=1e-3)
    # A scale and a zero-point in half precision a group, a scale in float32, or a byte for the modes of MLX without.
    assert report.bits_per_weight == pytest.approx(bits + (32 if mode in ("affine", "nf4") else 8) / group_size)
    assert report.bytes == 16384 * report.bits_per_weight / 8


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_parameters_are_counted_as_what_packed_weights_stand_for(bits: int) -> None:
    """Packed · (32 // bits) is wrong for 3, 5 and 6 bits."""
    model = network("qwen3 experts")
    before = parameter_count(model)
    quantize(model, settings_of(bits=bits, group_size=32))
    assert parameter_count(model) == before


def test_arrays_that_are_no_parameters_are_not_counted() -> None:
    model = Layers()
    model._frequencies = mx.ones((1000,))
    assert parameter_count(model) == 64 * 128 + 128 * 64


def test_embedding_and_head_are_quantized_too() -> None:
    model = network("llama untied")
    quantize(model, settings_of())
    assert isinstance(model.model.embed_tokens, nn.QuantizedEmbedding) and isinstance(model.lm_head, nn.QuantizedLinear)


def test_layers_the_group_does_not_divide_are_left_alone_and_named() -> None:
    model = network("llama")
    report = quantize(model, settings_of(group_size=128))
    assert all(path.endswith("mlp.down_proj") for path, layer in model.named_modules() if layer_settings(layer))
    assert "model.embed_tokens" in report.left_alone and "model.layers.1.self_attn.q_proj" in report.left_alone
    assert not any("down_proj" in path for path in report.left_alone)


def test_a_group_that_divides_nothing_changes_nothing_and_says_so() -> None:
    model = nn.Sequential(nn.Linear(24, 24))
    with pytest.raises(ModelError, match="no layer can be quantized with group size 64"):
        quantize(model, settings_of())
    assert not is_quantized(model)


def test_a_quantized_model_is_refused() -> None:
    model = Layers()
    quantize(model, settings_of())
    with pytest.raises(ModelError, match="quantized already"):
        quantize(model, settings_of())


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_routers_are_kept_as_mlx_lm_asks(mode: str) -> None:
    model = network("qwen3 experts")
    report = quantize(model, settings_of(mode, 4, 32))
    router = {"mode": "affine", "bits": 8, "group_size": 64}
    for index, layer in enumerate(model.model.layers):
        assert layer_settings(layer.mlp.gate) == router
        assert report.config[f"model.layers.{index}.mlp.gate"] == router
        assert layer_settings(layer.mlp.switch_mlp.up_proj) == settings_of(mode, 4, 32)


@pytest.mark.parametrize(
    ("mode", "bits", "group_size"),
    [*(settings for settings in SETTINGS if settings[0] != "nf4"), ("affine", 4, 32), ("affine", 4, 128)],
)
def test_a_saved_model_loads_in_mlx_lm_with_the_same_logits(
    tmp_path: Path, mode: str, bits: int, group_size: int
) -> None:
    source = write_model(tmp_path / "source", dtype=mx.float16, tie_word_embeddings=False)
    loaded = load_stored(source, quantization=Quantize(mode=mode, bits=bits, group_size=group_size))
    save(loaded, tmp_path / "packed")
    theirs, _ = mlx_lm.utils.load(str(tmp_path / "packed"))
    theirs.set_dtype(mx.float32)
    ours = load(tmp_path / "packed").model
    # on a GPU in float16, or where MLX's own kernels unpack to bfloat16 alone
    close = (2e-2 if mode == "affine" else 1e-1) if device.on_gpu() else 1e-3
    np.testing.assert_allclose(ours(TOKENS).astype(mx.float32), theirs(TOKENS), rtol=close, atol=close)
    assert is_quantized(theirs)


def test_experts_and_their_router_load_in_mlx_lm_with_the_same_logits(tmp_path: Path) -> None:
    network_ = network("qwen3 experts")
    source = write_model(tmp_path / "llama", num_hidden_layers=1)
    loaded = load_stored(source)
    args = {key: value for key, value in vars(network_.args).items() if value is not None}
    loaded.model, loaded.config = network_, args | {"eos_token_id": 1}  # within the small vocabulary
    loaded.config["quantization"] = quantize(network_, settings_of(bits=3, group_size=32)).config
    save(loaded, tmp_path / "packed")
    theirs, _ = mlx_lm.utils.load(str(tmp_path / "packed"))
    np.testing.assert_allclose(load(tmp_path / "packed").model(TOKENS), theirs(TOKENS), rtol=1e-3, atol=1e-3)


def test_unpacking_computes_in_float32_whatever_the_scales_are() -> None:
    """With half-precision scales MLX computes in half, 5e-4 off."""
    layer = nn.Linear(64, 64, bias=False)
    layer.set_dtype(mx.float16)
    packed = layer.to_quantized(group_size=64, bits=8)
    scales, biases = np.array(packed.scales, np.float64), np.array(packed.biases, np.float64)
    codes = np.array(packed.weight).view(np.uint8).reshape(64, 64)
    np.testing.assert_allclose(dequantize_layer(packed, mx.float32), codes * scales + biases, rtol=0, atol=1e-7)


@pytest.mark.parametrize("mode", list(MODES))
def test_activations_of_a_half_precision_model_stay_in_half_precision(tmp_path: Path, mode: str) -> None:
    """MLX's modes whose scales are integers unpack to bfloat16; float16 norms beside it would give float32."""
    loaded = load_stored(write_model(tmp_path / "half", dtype=mx.float16), quantization=Quantize(mode=mode))
    assert loaded.model(mx.array([[1, 2, 3]])).dtype == (mx.float16 if mode in ("affine", "nf4") else mx.bfloat16)
