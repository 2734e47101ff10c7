"""The formulas in numpy against MLX's own, on shapes that the embedded base doesn't have: fewer heads of keys."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.methods import MODES
from mlx_lora.models.load import LoadedModel
from mlx_lora.tasks.reference import Llama, dequantized, e4m3, slope

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 19))


def test_logits_with_grouped_heads(tiny: LoadedModel, tiny_path: Path) -> None:
    assert tiny.config["num_key_value_heads"] < tiny.config["num_attention_heads"]
    expected = np.array(tiny.model(mx.array(TOKENS)))
    np.testing.assert_allclose(Llama.read(tiny_path).logits(TOKENS), expected, rtol=1e-3, atol=1e-4)


def test_the_loss_is_a_weighted_mean_over_the_targets(tiny_path: Path) -> None:
    llama, weights = Llama.read(tiny_path), np.zeros(TOKENS.shape)
    weights[1, 3], weights[0, 7] = 1.0, 3.0
    shares = np.exp(llama.logits(TOKENS))
    shares /= shares.sum(axis=-1, keepdims=True)
    expected = -(np.log(shares[1, 3, 5]) + 3 * np.log(shares[0, 7, 5])) / 4
    assert llama.loss(TOKENS, np.full(TOKENS.shape, 5), weights) == pytest.approx(expected)


def test_merging_adds_the_scaled_product_in_the_weights_own_orientation(tiny_path: Path) -> None:
    draw = np.random.default_rng(1)
    shapes = {"model.layers.1.mlp.up_proj": (64, 128), "model.embed_tokens": (262, 64)}
    adapter = {}
    for path, (first, last) in shapes.items():
        adapter |= {f"{path}.lora_a": draw.normal(size=(first, 3)), f"{path}.lora_b": draw.normal(size=(3, last))}
    llama = Llama.read(tiny_path)
    merged = llama.merged(adapter, 0.5)
    for path, transposed in zip(shapes, (True, False), strict=True):
        update = merged.weights[f"{path}.weight"] - llama.weights[f"{path}.weight"]
        expected = 0.5 * adapter[f"{path}.lora_a"] @ adapter[f"{path}.lora_b"]
        np.testing.assert_allclose(update, expected.T if transposed else expected)
    changed = [name for name, weight in merged.weights.items() if weight is not llama.weights[name]]
    assert sorted(changed) == sorted(f"{path}.weight" for path in shapes)


@pytest.mark.parametrize(
    ("mode", "bits", "group_size"),
    [(mode, bits, size) for mode, (kinds, sizes) in MODES.items() if mode != "nf4" for bits in kinds for size in sizes],
)
def test_unpacking_is_mlxs(mode: str, bits: int, group_size: int) -> None:
    settings = {"mode": mode, "bits": bits, "group_size": group_size}
    weight = mx.array(np.random.default_rng(2).normal(size=(8, 256)).astype(np.float32) * np.logspace(-4, 4, 256))
    packed, scales, *biases = mx.quantize(weight, **settings)
    expected = np.array(mx.dequantize(packed, scales, *biases, **settings, dtype=mx.float32))
    arrays = (np.array(packed), np.array(scales), *(np.array(bias) for bias in biases or [mx.array(0)]))
    ours = dequantized(arrays[0], arrays[1], arrays[2] if biases else None, **settings)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_every_number_of_eight_bits_is_mlxs() -> None:
    codes = np.array([code for code in range(256) if code & 127 != 127], np.uint8)  # those two aren't numbers
    expected = np.array(mx.from_fp8(mx.array(codes), dtype=mx.float32))
    np.testing.assert_array_equal(e4m3(codes), expected)


def test_a_slope_is_a_derivative_along_a_direction() -> None:
    arrays = {"x": np.array([1.0, 2.0]), "y": np.array([3.0])}
    found = slope(lambda at: float((at["x"] ** 2).sum() * at["y"][0]), arrays, {"x": np.array([1.0, -1.0])})
    assert found == pytest.approx(3 * (2 - 4), rel=1e-8)
