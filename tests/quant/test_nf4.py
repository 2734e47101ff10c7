"""NF4's codes and values are those of plain numpy, its error is the paper's, and a packed model is a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import attach, build
from mlx_lora.config import Adapter, Quantize
from mlx_lora.errors import ModelError
from mlx_lora.interop.fuse import merge
from mlx_lora.machine import device
from mlx_lora.methods import MODES
from mlx_lora.models import SwitchLinear
from mlx_lora.models.layers import plain_layer, set_modules
from mlx_lora.models.load import load, load_stored
from mlx_lora.models.save import save
from mlx_lora.models.shapes import network as shapes_of
from mlx_lora.models.shapes import summary
from mlx_lora.quant import matmul, nf4
from mlx_lora.quant.nf4 import NF4Embedding, NF4Linear, NF4SwitchLinear, quantize, unpack
from mlx_lora.quant.quantize import (
    dequantize_layer,
    is_quantized,
    layer_settings,
    model_bytes,
    packed_layer,
    parameter_count,
)
from mlx_lora.quant.quantize import quantize as quantize_model
from mlx_lora.store import fingerprint
from mlx_lora.tasks.reference import NF4, dequantized
from tests.adapters.zoo import network
from tests.conftest import write_model

GROUPS = MODES["nf4"][1]
TOKENS = mx.array([[5, 9, 70, 2, 33, 11, 8]])


def gaussian(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def settings_of(group_size: int = 64, *, double_quant: bool = False) -> dict[str, Any]:
    return {"mode": "nf4", "bits": 4, "group_size": group_size, "double_quant": double_quant}


def codes_of(packed: mx.array) -> np.ndarray:
    """The 4-bit numbers of words of 32 bits, the lowest first."""
    words = np.array(packed)
    return ((words[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15).reshape(*words.shape[:-1], -1)


def nearest(weight: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales in numpy: how many midpoints of the table, times the scale, a weight is above."""
    groups = weight.astype(np.float32).reshape(*weight.shape[:-1], -1, group_size)
    scales = np.abs(groups).max(axis=-1)
    middles = ((NF4[1:] + NF4[:-1]) / 2).astype(np.float32)
    codes = (groups[..., None] > scales[..., None, None] * middles).sum(axis=-1)
    return codes.reshape(weight.shape), scales


def test_the_table_has_the_papers_sixteen_numbers() -> None:
    """Appendix E; a copy of it serves the selftest."""
    assert len(nf4.CODEBOOK) == 16 and list(nf4.CODEBOOK) == sorted(nf4.CODEBOOK)
    np.testing.assert_array_equal(nf4.CODEBOOK, NF4)
    assert (nf4.CODEBOOK[0], nf4.CODEBOOK[nf4.ZERO], nf4.CODEBOOK[-1]) == (-1.0, 0.0, 1.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("group_size", GROUPS)
def test_codes_scales_and_values_are_numpys(group_size: int, dtype: Any) -> None:
    weight = gaussian(48, 384, dtype=dtype)
    made = quantize(mx.array(weight), group_size)
    codes, scales = nearest(weight, group_size)
    np.testing.assert_array_equal(codes_of(made["weight"]), codes)
    np.testing.assert_array_equal(made["scales"], scales)
    assert (made["weight"].dtype, made["scales"].dtype) == (mx.uint32, mx.float32)
    values = NF4.astype(np.float32)[codes].reshape(*scales.shape, group_size) * scales[..., None]
    np.testing.assert_array_equal(unpack(list(made.values())), values.reshape(weight.shape))


def test_every_weight_gets_the_nearest_number() -> None:
    weight = gaussian(16, 256, seed=1)
    made = quantize(mx.array(weight))
    groups = weight.reshape(16, -1, 64).astype(np.float64)
    distances = np.abs(groups[..., None] - np.abs(groups).max(axis=-1)[..., None, None] * NF4)
    np.testing.assert_array_equal(codes_of(made["weight"]), distances.argmin(axis=-1).reshape(weight.shape))


def test_ties_go_down_and_zeros_stay_zero() -> None:
    middles = np.array(nf4.MIDPOINTS, np.float32)
    weight = np.zeros((2, 64), np.float32)
    weight[0, :16] = [1.0, *middles]
    made = quantize(mx.array(weight))
    np.testing.assert_array_equal(codes_of(made["weight"])[0, :16], [15, *range(15)])
    np.testing.assert_array_equal(unpack(list(made.values()))[1], np.zeros(64))


@pytest.mark.parametrize("shape", [(64, 1024), (7, 192), (3, 5, 128)], ids=str)
def test_double_quantization_is_numpys(shape: tuple[int, ...]) -> None:
    """Blocks of 256 scales, whatever rows they come from, the last one shorter."""
    weight = gaussian(*shape, seed=2)
    made = quantize(mx.array(weight), double_quant=True)
    codes, scales = nearest(weight, 64)
    mean = np.array(mx.array(scales.mean(dtype=np.float64), mx.float32).astype(mx.bfloat16).astype(mx.float32))
    distance = (scales - mean).reshape(-1)
    blocks = [distance[start : start + 256] for start in range(0, distance.size, 256)]
    steps = np.array([np.abs(block).max() / np.float32(127) for block in blocks])
    eight = np.concatenate([np.round(block / step) for block, step in zip(blocks, steps, strict=True)])
    np.testing.assert_array_equal(codes_of(made["weight"]), codes)
    np.testing.assert_array_equal(made["scales"], eight.reshape(scales.shape))
    np.testing.assert_array_equal(made["nested_scales"], steps)
    np.testing.assert_array_equal(made["nested_mean"], mean[None])
    assert made["scales"].dtype == mx.int8 and made["nested_scales"].dtype == mx.float32
    again = eight.astype(np.float32) * steps.repeat(256)[: eight.size] + mean
    values = NF4.astype(np.float32)[codes].reshape(-1, 64) * again[:, None]
    arrays = list(made.values())
    np.testing.assert_array_equal(unpack(arrays), values.reshape(shape))
    np.testing.assert_array_equal(unpack(arrays, slice(1, 3)), values.reshape(shape)[1:3])
    np.testing.assert_array_equal(unpack(arrays, mx.array([[2, 0]])), values.reshape(shape)[np.array([[2, 0]])])


def test_bits_per_weight() -> None:
    """§3: 0.5 bits a weight for the scales, 0.127 with double quantization; also where no block of scales is full."""
    weight = mx.array(gaussian(1024, 4096))

    def bits(weight: mx.array, group_size: int = 64, *, double_quant: bool) -> float:
        made = quantize(weight, group_size, double_quant=double_quant)
        return 8 * sum(array.nbytes for array in made.values()) / weight.size

    assert bits(weight, double_quant=False) == 4.5 and bits(weight, 128, double_quant=False) == 4.25
    assert bits(weight, double_quant=True) == pytest.approx(4.127, abs=1e-3)
    assert bits(weight[:576, :576], double_quant=True) == pytest.approx(4.127, abs=0.01)
    model = network("llama")
    report = quantize_model(model, settings_of(double_quant=True))
    packed = [module for module in model.modules() if nf4.is_nf4(module)]
    assert report.bytes == model_bytes(model) == sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert {array.dtype for module in packed for array in module.arrays()} == {mx.uint32, mx.int8, mx.float32}


def test_the_error_on_gaussian_weights_is_the_papers_and_below_affine() -> None:
    weight = mx.array(gaussian(1024, 4096, seed=3))

    def error(mode: str, group_size: int, **more: Any) -> float:
        plain = nn.Linear(1, 1, bias=False)
        plain.weight = weight
        packed = packed_layer(plain, {"mode": mode, "bits": 4, "group_size": group_size, **more})
        return float(mx.square(weight - dequantize_layer(packed, mx.float32)).mean())

    fine, usual, twice = error("nf4", 32), error("nf4", 64), error("nf4", 64, double_quant=True)
    assert usual == pytest.approx(0.0085, rel=0.01) and fine == pytest.approx(0.0076, rel=0.01)
    assert usual < error("affine", 128) == pytest.approx(0.0100, rel=0.01), "4.5 and 4.127 bits against 4.25"
    assert twice < 1.01 * usual
    assert fine < error("affine", 64) == pytest.approx(0.0083, rel=0.01)


def linear(outputs: int = 24, inputs: int = 128) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    layer.weight, layer.bias = mx.array(gaussian(outputs, inputs)), mx.array(gaussian(outputs, seed=1))
    return layer


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("rows", [1, 9])
def test_a_linear_and_its_gradient_equal_a_dense_product(
    rows: int, double_quant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "BLOCK_BYTES", 4 * 128 * 5)  # five rows of the weight: the last block is smaller
    layer = NF4Linear(linear(), 64, double_quant)
    weight = np.array(dequantize_layer(layer, mx.float32), np.float64)
    x, cotangent = mx.array(gaussian(1, rows, 128, seed=4)), mx.array(gaussian(1, rows, 24, seed=5))
    (y,), (gradient,) = mx.vjp(layer, [x], [cotangent])
    np.testing.assert_allclose(y, np.array(x) @ weight.T + np.array(layer.bias), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(gradient, np.array(cotangent) @ weight, rtol=2e-5, atol=2e-5)
    assert layer(x.astype(mx.float16)).dtype == mx.float32 and isinstance(layer, nn.QuantizedLinear)  # float32 bias
    assert not layer.trainable_parameters()


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_an_embedding_keeps_its_dtype_and_serves_as_head(dtype: mx.Dtype, double_quant: bool) -> None:
    plain = nn.Embedding(40, 192)
    plain.set_dtype(dtype)
    layer = NF4Embedding(plain, 64, double_quant)
    weight = np.array(dequantize_layer(layer, mx.float32))
    tokens, x = mx.array([[3, 39, 0]]), mx.array(gaussian(5, 192))
    assert layer(tokens).dtype == dtype
    np.testing.assert_array_equal(layer(tokens), np.array(mx.array(weight[np.array(tokens)]).astype(dtype)))
    np.testing.assert_allclose(layer.as_linear(x), np.array(x) @ weight.T, rtol=2e-5, atol=2e-5)
    nf4.compute_in(nn.Sequential(layer), mx.bfloat16)
    assert layer(tokens).dtype == mx.bfloat16


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("shape", [(2, 1), (8, 3), (9,)], ids=str)
def test_experts_and_their_gradient_equal_those_with_dense_weights(shape: tuple[int, ...], double_quant: bool) -> None:
    """With fewer choices than experts only those chosen are unpacked."""
    plain = SwitchLinear(128, 24, 5)
    plain.weight, plain.bias = mx.array(gaussian(5, 24, 128)), mx.array(gaussian(5, 24, seed=1))
    layer = packed_layer(plain, settings_of(double_quant=double_quant))
    assert isinstance(layer, NF4SwitchLinear)
    dense = plain_layer(layer, dequantize_layer(layer, mx.float32))
    indices = mx.array(np.random.default_rng(0).integers(0, 5, shape))
    lines = mx.array(gaussian(*shape[:-1], 1, 1, 128) if len(shape) > 1 else gaussian(9, 1, 128))
    cotangent = mx.array(gaussian(*shape, 1, 24, seed=2))
    if len(shape) == 1:
        indices = mx.sort(indices)

    def both(layer: Any) -> tuple[mx.array, mx.array]:
        call: Callable[[mx.array], mx.array] = lambda x: layer(x, indices, sorted_indices=len(shape) == 1)  # noqa: E731
        (y,), (gradient,) = mx.vjp(call, [lines], [cotangent])
        return y, gradient

    for ours, theirs in zip(both(layer), both(dense), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)
    assert (layer.num_experts, layer.output_dims, layer.input_dims) == (5, 24, 128)


@pytest.mark.parametrize("name", ["llama", "llama untied", "gemma3", "qwen3 experts"])
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
def test_a_packed_model_computes_what_its_unpacked_weights_do(name: str, double_quant: bool) -> None:
    model, plain = network(name), network(name)
    report = quantize_model(model, settings_of(32, double_quant=double_quant))
    packed = {path: module for path, module in model.named_modules() if "scales" in module}
    set_modules(
        plain, {path: plain_layer(layer, dequantize_layer(layer, mx.float32)) for path, layer in packed.items()}
    )
    np.testing.assert_allclose(model(TOKENS), plain(TOKENS), rtol=2e-4, atol=2e-4)
    assert not report.left_alone and is_quantized(model) and parameter_count(model) == parameter_count(plain)
    kinds = {layer_settings(module)["mode"] for module in packed.values()}  # type: ignore[index]
    assert kinds == ({"nf4", "affine"} if "experts" in name else {"nf4"}), "routers are kept as mlx_lm asks"


@pytest.mark.parametrize(("group_size", "double_quant"), [(32, False), (64, True)])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_saved_model_loads_as_it_was(tmp_path: Path, group_size: int, double_quant: bool, tied: bool) -> None:
    source = write_model(tmp_path / "source", dtype=mx.float16, tie_word_embeddings=tied)
    quantization = Quantize(mode="nf4", group_size=group_size, double_quant=double_quant)
    first = load_stored(source, quantization=quantization)
    save(first, tmp_path / "packed")
    again = load_stored(tmp_path / "packed")
    saved, read = (dict(tree_flatten(loaded.model.parameters())) for loaded in (first, again))
    assert saved.keys() == read.keys()
    for name, array in saved.items():
        assert array.dtype == read[name].dtype and mx.array_equal(array, read[name]), name
    wanted = settings_of(group_size, double_quant=double_quant)
    assert again.config["quantization"] == again.config["quantization_config"] == wanted
    assert again.stored == mx.float16, "float32 scales don't make a float32 model"
    assert fingerprint.of_model(again.model) == fingerprint.of_directory(tmp_path / "packed")
    ours = load(source, quantization=quantization).model(TOKENS)
    np.testing.assert_array_equal(load(tmp_path / "packed").model(TOKENS), ours)
    assert ours.dtype == device.activation_dtype(mx.float16)
    shapes = shapes_of(summary(tmp_path / "packed"), gpu=device.on_gpu())
    loaded = load(tmp_path / "packed").model
    assert [(name, array.shape, array.dtype) for name, array in tree_flatten(shapes.parameters())] == [
        (name, array.shape, array.dtype) for name, array in tree_flatten(loaded.parameters())
    ]


def test_mlx_lm_refuses_it(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", dtype=mx.float16)
    save(load_stored(source, quantization=Quantize(mode="nf4")), tmp_path / "packed")
    with pytest.raises(ValueError, match="biases"):
        mlx_lm.utils.load(str(tmp_path / "packed"))


def test_a_directory_that_lacks_a_tensor_or_says_what_cant_be_is_refused(tmp_path: Path) -> None:
    loaded = load_stored(write_model(tmp_path / "source"), quantization=Quantize(mode="nf4"))
    loaded.config["quantization"] = settings_of(double_quant=True)
    save(loaded, tmp_path / "other")
    with pytest.raises(ModelError, match="is missing, no file has it, and so are 43 more"):
        load_stored(tmp_path / "other")
    loaded.config["quantization"] = {**settings_of(), "bits": 8}
    save(loaded, tmp_path / "bits")
    with pytest.raises(ModelError, match="nf4"):
        load_stored(tmp_path / "bits")


def test_shapes_cost_no_memory() -> None:
    config = {
        "model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 2, "intermediate_size": 22016,
        "num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 128, "vocab_size": 32000,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = shapes_of(config, quantization=settings_of(double_quant=True), gpu=True)
    assert model_bytes(model) == pytest.approx(parameter_count(model) * 4.127 / 8, rel=0.001)
    assert mx.get_peak_memory() - before < 1 << 20


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_no_dense_copy_lives_until_the_backward_pass(compiled: bool) -> None:
    depth, width = 64, 256
    layers = []
    for index in range(depth):
        plain = nn.Linear(width, width, bias=False)
        plain.weight = mx.random.normal((width, width), scale=width**-0.5, key=mx.random.key(index))
        layers.append(NF4Linear(plain, 64, True))

    def loss(x: mx.array) -> mx.array:
        for layer in layers:
            x = mx.tanh(layer(x))
        return x.square().sum()

    gradient: Callable[[mx.array], mx.array] = mx.grad(loss)
    gradient = mx.compile(gradient) if compiled else gradient
    x = mx.random.normal((8, width), key=mx.random.key(99))
    mx.eval(x, [layer.parameters() for layer in layers])
    mx.eval(gradient(x))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(gradient(x))
    assert mx.get_peak_memory() - before < depth * width * width * 4 / 4


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
def test_the_numpy_formula_agrees(double_quant: bool) -> None:
    made = quantize(mx.array(gaussian(20, 960)), 32, double_quant=double_quant)
    arrays = {name: np.array(array) for name, array in made.items()}
    nested = (arrays["nested_scales"], arrays["nested_mean"]) if double_quant else None
    values = dequantized(arrays["weight"], arrays["scales"], None, group_size=32, bits=4, mode="nf4", nested=nested)
    np.testing.assert_allclose(unpack(list(made.values())), values, rtol=1e-6, atol=1e-7)


def test_settings_are_checked_and_completed() -> None:
    assert Quantize(mode="nf4").complete() == settings_of()
    assert Quantize(mode="nf4", group_size=128, double_quant=True).complete() == settings_of(128, double_quant=True)
    assert "double_quant" not in Quantize().complete()
    with pytest.raises(ValueError, match="double_quant for mode affine; only nf4"):
        Quantize(double_quant=True)
    with pytest.raises(ValueError, match="bits 8 for mode nf4, which takes 4; group_size 16"):
        Quantize(mode="nf4", bits=8, group_size=16)


def test_layers_it_does_not_serve_are_left_alone_and_named() -> None:
    class Own(nn.Linear):
        """Multiplies in its own way."""

    model = nn.Sequential(Own(64, 64), nn.Linear(64, 64), nn.Linear(48, 8))
    report = quantize_model(model, settings_of())
    assert report.left_alone == ["layers.0", "layers.2"] and isinstance(model.layers[1], NF4Linear)


def test_an_adapter_over_it_starts_equal_and_merges(tmp_path: Path) -> None:
    loaded = load(write_model(tmp_path / "m"), quantization=Quantize(mode="nf4", double_quant=True))
    before = loaded.model(TOKENS)
    wrappers = attach(loaded.model, Adapter(targets=["q_proj", "down_proj", "embed_tokens"]))
    np.testing.assert_array_equal(loaded.model(TOKENS), before)
    for wrapper in wrappers.values():
        wrapper.lora_b = mx.random.normal(wrapper.lora_b.shape, scale=0.1)
        merged = wrapper.fuse().weight
        expected = dequantize_layer(wrapper.base, mx.float32) + wrapper.delta()
        np.testing.assert_allclose(merged, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", ["keep", "mixed", "8", "16"])
def test_an_adapter_is_fused_into_it(tmp_path: Path, bits: str) -> None:
    source = write_model(tmp_path / "source", dtype=mx.float16)
    settings = Quantize(mode="nf4", group_size=32, double_quant=True)
    save(load_stored(source, quantization=settings), tmp_path / "packed")
    stored = load_stored(tmp_path / "packed")
    wrapper = build(stored.model, Adapter(targets=["down_proj"], layers=[1]))["model.layers.1.mlp.down_proj"]
    wrapper.lora_b = mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(0))
    merged = merge(wrapper, bits, stored.stored)
    modes = {"keep": "nf4", "mixed": "affine", "8": None, "16": None}
    assert (layer_settings(merged) or {"mode": None})["mode"] == modes[bits]
    expected = dequantize_layer(wrapper.base, mx.float32) + wrapper.delta()
    away = mx.linalg.norm(dequantize_layer(merged, mx.float32) - expected) / mx.linalg.norm(expected)
    assert away.item() < {"keep": 0.1, "mixed": 0.01}.get(bits, 1e-3)
