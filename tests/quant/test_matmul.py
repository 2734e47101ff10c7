"""The dequantizing multiply equals a dense product, keeps no dense copy, and holds the arrays of its layer."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_lora.methods import MODES
from mlx_lora.quant import matmul
from mlx_lora.quant.matmul import FEW_ROWS, DequantizingEmbedding, DequantizingLinear, like, use_fast_multiply
from mlx_lora.quant.quantize import dequantize_layer

NATIVE = {mode: MODES[mode] for mode in MODES if mode != "nf4"}
SETTINGS = [(mode, bits, group) for mode, (widths, groups) in NATIVE.items() for bits in widths for group in groups]
OUT, IN, ROWS = 24, 128, 9


def packed(mode: str, bits: int, group_size: int, *, bias: bool = True) -> nn.QuantizedLinear:
    plain = nn.Linear(IN, OUT, bias=bias)
    plain.weight = mx.random.normal((OUT, IN), key=mx.random.key(bits))
    if bias:
        plain.bias = mx.random.normal((OUT,), key=mx.random.key(1))
    return plain.to_quantized(group_size=group_size, bits=bits, mode=mode)


@pytest.mark.parametrize(("mode", "bits", "group_size"), SETTINGS)
def test_values_and_gradients_equal_a_dense_product(mode: str, bits: int, group_size: int) -> None:
    layer = packed(mode, bits, group_size)
    fast = like(layer, DequantizingLinear)
    x = mx.random.normal((3, 3, IN), key=mx.random.key(2))
    cotangent = mx.random.normal((3, 3, OUT), key=mx.random.key(3))
    (y,), (gradient,) = mx.vjp(fast, [x], [cotangent])
    weight = np.array(dequantize_layer(layer, mx.float32), np.float64)
    np.testing.assert_allclose(y, np.array(x) @ weight.T + np.array(layer.bias), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(gradient, np.array(cotangent) @ weight, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(y, layer(x), rtol=2e-5, atol=2e-5, err_msg="mx.quantized_matmul says something else")


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
def test_few_and_many_rows_give_the_same(rows: int) -> None:
    layer = packed("affine", 4, 64)
    x = mx.random.normal((1, rows, IN), key=mx.random.key(4))
    np.testing.assert_allclose(like(layer, DequantizingLinear)(x), layer(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_no_dense_copy_lives_until_the_backward_pass(compiled: bool) -> None:
    depth, width = 64, 256  # MLX's CPU backend runs some ten operations ahead, so about that many copies are alive
    layers = []
    for index in range(depth):
        weight = mx.random.normal((width, width), scale=width**-0.5, key=mx.random.key(index))
        plain = nn.Linear(width, width, bias=False)
        plain.weight = weight
        layers.append(like(plain.to_quantized(group_size=64, bits=4), DequantizingLinear))

    def loss(x: mx.array) -> mx.array:
        for layer in layers:
            x = mx.tanh(layer(x))
        return x.square().sum()

    gradient: Callable[[mx.array], mx.array] = mx.grad(loss)
    gradient = mx.compile(gradient) if compiled else gradient
    x = mx.random.normal((FEW_ROWS + 1, width), key=mx.random.key(99))
    mx.eval(x, [layer.parameters() for layer in layers])  # before tracing, or the trace would make them each time
    mx.eval(gradient(x))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(gradient(x))
    dense = depth * width * width * 4
    assert mx.get_peak_memory() - before < dense / 4


def test_a_large_weight_is_unpacked_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The output head of a small model is a quarter of it: whole, it would be the peak of a step."""
    monkeypatch.setattr(matmul, "BLOCK_BYTES", 4 * IN * 5)  # five rows: the last block is a smaller one
    layer = packed("affine", 4, 64, bias=False)
    x, cotangent = mx.random.normal((ROWS, IN)), mx.random.normal((ROWS, OUT))
    (y,), (gradient,) = mx.vjp(like(layer, DequantizingLinear), [x], [cotangent])
    weight = np.array(dequantize_layer(layer, mx.float32), np.float64)
    np.testing.assert_allclose(y, np.array(x) @ weight.T, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(gradient, np.array(cotangent) @ weight, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_blocks_wait_for_each_other(compiled: bool) -> None:
    """MLX evaluates independent operations side by side: without an order every block would be alive at once."""
    layer = like(nn.QuantizedLinear(512, 1 << 16, bias=False, group_size=64, bits=4), DequantizingLinear)
    x = mx.random.normal((4, 512))
    gradient = mx.grad(lambda x: layer(x).square().sum())
    gradient = mx.compile(gradient) if compiled else gradient
    mx.eval(x, layer.parameters())
    mx.eval(gradient(x))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(gradient(x))
    dense = 4 * 512 << 16
    assert mx.get_peak_memory() - before < dense / 2  # 128 MB in sixteen blocks, of which half a dozen are alive


def test_scales_stay_half_and_are_used_exactly() -> None:
    layer = packed("affine", 4, 64)
    layer.scales, layer.biases = layer.scales.astype(mx.float16), layer.biases.astype(mx.float16)
    model = nn.Sequential(layer)
    use_fast_multiply(model)
    assert model.layers[0].scales.dtype == mx.float16 and model.layers[0].bias.dtype == mx.float32
    x = mx.random.normal((ROWS, IN))
    weight = np.array(dequantize_layer(layer, mx.float32), np.float64)
    np.testing.assert_allclose(model(x), np.array(x) @ weight.T + np.array(layer.bias), rtol=2e-5, atol=2e-5)


def test_fast_layers_hold_the_very_same_arrays() -> None:
    model = nn.Sequential(nn.QuantizedEmbedding(32, 64), nn.QuantizedLinear(64, 64), nn.Linear(64, 8))
    mx.eval(model.parameters())
    before = {id(array) for module in model.leaf_modules()["layers"] for array in module.values()}
    use_fast_multiply(model)
    assert [type(layer) for layer in model.layers] == [DequantizingEmbedding, DequantizingLinear, nn.Linear]
    assert {id(array) for module in model.leaf_modules()["layers"] for array in module.values()} == before
    assert not model.layers[1].trainable_parameters(), "a packed layer stays frozen"


@pytest.mark.parametrize("mode", list(NATIVE))
def test_an_embedding_is_float32_and_serves_as_head(mode: str) -> None:
    (bits, *_), (group_size, *_) = MODES[mode]
    plain = nn.Embedding(40, 64)
    layer = like(plain.to_quantized(group_size=group_size, bits=bits, mode=mode), DequantizingEmbedding)
    weight = np.array(dequantize_layer(layer, mx.float32))
    tokens, x = mx.array([[3, 39, 0]]), mx.random.normal((5, 64), key=mx.random.key(0))
    assert layer(tokens).dtype == mx.float32
    np.testing.assert_array_equal(layer(tokens), weight[np.array(tokens)])
    np.testing.assert_allclose(layer.as_linear(x), np.array(x) @ weight.T, rtol=2e-5, atol=2e-5)
