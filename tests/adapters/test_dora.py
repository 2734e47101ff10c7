"""What is DoRA's own: norms without the dense update, a norm that takes no gradient, and mlx-lm's arithmetic."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_lora.adapters import dora
from mlx_lora.adapters.attach import attach, put
from mlx_lora.config import Adapter
from mlx_lora.models import SwitchLinear
from mlx_lora.quant import nf4
from mlx_lora.quant.quantize import dequantize_layer
from mlx_lora.store.adapter import Manifest, read, save, wrappers_for
from tests.adapters.zoo import network

OUT, IN, EXPERTS, RANK = 96, 64, 4, 3
CONFIG = Adapter(method="dora", rank=RANK, alpha=6)


def linear(bias: bool = True) -> nn.Module:
    layer = nn.Linear(IN, OUT, bias=bias)
    layer.weight = mx.random.normal((OUT, IN), key=mx.random.key(1))
    return layer


def embedding() -> nn.Module:
    layer = nn.Embedding(OUT, IN)
    layer.weight = mx.random.normal((OUT, IN), key=mx.random.key(2))
    return layer


LAYERS = {
    "linear": linear,
    "linear 4 bits": lambda: linear().to_quantized(group_size=32, bits=4),
    "linear 3 bits": lambda: linear().to_quantized(group_size=32, bits=3),
    "linear mxfp4": lambda: linear().to_quantized(group_size=32, bits=4, mode="mxfp4"),
    "linear nf4 twice": lambda: nf4.NF4Linear(linear(), double_quant=True),
    "embedding": embedding,
    "embedding 4 bits": lambda: embedding().to_quantized(group_size=32, bits=4),
    "experts": lambda: SwitchLinear(IN, OUT, EXPERTS, bias=True),
    "experts 4 bits": lambda: SwitchLinear(IN, OUT, EXPERTS).to_quantized(group_size=32, bits=4),
}


def wrap(layer: nn.Module, *, strength: float = 0.3, config: Adapter = CONFIG) -> dora.DoRA:
    layer.freeze()
    wrapper = dora.DoRA.from_base(layer, config, path="layer", key=mx.random.key(3))
    wrapper.lora_b = strength * mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(4))
    wrapper.m = wrapper.m * mx.random.uniform(0.5, 1.5, wrapper.m.shape, key=mx.random.key(5))
    return wrapper.eval()


def direction(wrapper: dora.DoRA) -> np.ndarray:
    """W₀ + sBA in float64, formed."""
    left, right = (np.array(factor, np.float64) for factor in wrapper.sides())
    return np.array(dequantize_layer(wrapper.base, mx.float32), np.float64) + wrapper.scale * left @ right


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("kind", LAYERS)
def test_gain_and_delta_are_those_of_the_weight_formed_whole(
    kind: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever number of rows, or of experts, is unpacked at a time."""
    expert = OUT if "experts" in kind else 1
    monkeypatch.setattr(dora, "BLOCK_BYTES", 4 * IN * rows * expert)
    wrapper = wrap(LAYERS[kind]())
    whole = direction(wrapper)
    gain = np.array(wrapper.m, np.float64) / np.linalg.norm(whole, axis=-1)
    np.testing.assert_allclose(wrapper.gain(), gain, rtol=2e-5)
    base = np.array(dequantize_layer(wrapper.base, mx.float32), np.float64)
    np.testing.assert_allclose(wrapper.delta(), gain[..., None] * whole - base, rtol=1e-4, atol=2e-5)


def test_no_gradient_goes_through_the_norm() -> None:
    """Eq. 11: lora_b's gradient is that of a weight divided by a constant; m's that of the direction."""
    wrapper = wrap(linear())
    x, weight = mx.random.normal((5, IN), key=mx.random.key(6)), wrapper.base["weight"]

    def dense(a: mx.array, b: mx.array, m: mx.array, *, constant: bool) -> mx.array:
        whole = weight + wrapper.scale * (a @ b).T
        norm = mx.linalg.norm(whole, axis=1)
        norm = mx.stop_gradient(norm) if constant else norm
        return (x @ (m[:, None] * whole / norm[:, None]).T + wrapper.base["bias"]).square().sum()

    arrays = list(wrapper.adapter_arrays().values())
    _, ours = nn.value_and_grad(wrapper, lambda: wrapper(x).square().sum())()
    expected, through = (
        mx.grad(lambda *given, constant=constant: dense(*given, constant=constant), argnums=[0, 1, 2])(*arrays)
        for constant in (True, False)
    )
    for name, gradient, other in zip(wrapper.adapter_params(), expected, through, strict=True):
        np.testing.assert_allclose(ours[name], gradient, rtol=1e-3, atol=2e-3 * float(mx.abs(gradient).max()))
        assert name == "m" or not np.allclose(gradient, other, rtol=0.1), "the norm would not have shown"


def test_rows_of_zeros_stay_finite() -> None:
    """Padding of a vocabulary: a norm of zero is divided by nowhere, not at the start and not in training."""
    layer = embedding()
    layer.weight = mx.where(mx.arange(OUT)[:, None] < 4, 0, layer.weight)
    layer.freeze()
    wrapper = dora.DoRA.from_base(layer, CONFIG, path="layer", key=mx.random.key(3))
    tokens, x = mx.array([0, 3, 50]), mx.random.normal((2, IN))
    np.testing.assert_array_equal(wrapper(tokens), layer(tokens))
    np.testing.assert_array_equal(wrapper.as_linear(x), layer.as_linear(x))
    _, gradients = nn.value_and_grad(wrapper, lambda: wrapper(tokens).sum() + wrapper.as_linear(x).square().sum())()
    assert all(mx.isfinite(gradients[name]).all().item() for name in wrapper.adapter_params())


@pytest.mark.parametrize("kind", ["linear", "linear 4 bits", "linear mxfp4"])
def test_mlx_lm_computes_the_same_from_the_same_arrays(kind: str) -> None:
    from mlx_lm.tuner.dora import DoRALinear

    wrapper = wrap(LAYERS[kind]())
    theirs = DoRALinear.from_base(wrapper.base, r=RANK, scale=wrapper.scale)
    expected = {name: tuple(theirs[name].shape) for name in wrapper.adapter_params()}
    assert {name: tuple(array.shape) for name, array in wrapper.adapter_arrays().items()} == expected
    theirs.load_weights(list(wrapper.adapter_arrays().items()), strict=False)
    theirs.eval()
    x = mx.random.normal((5, IN), key=mx.random.key(6))
    np.testing.assert_allclose(wrapper(x), theirs(x), rtol=1e-4, atol=1e-4)
    if kind != "linear mxfp4":  # merged in half precision there
        np.testing.assert_allclose(wrapper.fuse()(x), theirs.fuse(dequantize=True)(x), rtol=1e-4, atol=1e-4)


def test_mlx_lm_computes_the_same_for_an_embedding() -> None:
    from mlx_lm.tuner.dora import DoRAEmbedding

    wrapper = wrap(embedding())
    theirs = DoRAEmbedding.from_base(wrapper.base, r=RANK, scale=wrapper.scale)
    theirs.load_weights(list(wrapper.adapter_arrays().items()), strict=False)
    theirs.eval()
    tokens, x = mx.array([[0, 5, 95]]), mx.random.normal((5, IN), key=mx.random.key(6))
    np.testing.assert_allclose(wrapper(tokens), theirs(tokens), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(wrapper.as_linear(x), theirs.as_linear(x), rtol=1e-4, atol=1e-4)


def test_dropout_is_of_the_low_rank_path_only() -> None:
    wrapper = wrap(linear(), strength=0.0, config=CONFIG.model_copy(update={"dropout": 0.5}))
    x = mx.random.normal((5, IN), key=mx.random.key(6))
    still = np.array(wrapper(x))
    wrapper.train()
    np.testing.assert_array_equal(wrapper(x), still, err_msg="with B at zero there is nothing to drop")
    wrapper.lora_b = mx.ones(wrapper.lora_b.shape)
    assert not np.array_equal(wrapper(x), wrapper(x))


def test_a_frozen_wrapper_computes_its_gain_once_for_the_arrays_it_has() -> None:
    wrapper, x = wrap(linear()), mx.random.normal((5, IN), key=mx.random.key(6))
    expected = np.array(wrapper(x))
    assert wrapper.gain() is not wrapper.gain(), "what trains changes"
    wrapper.freeze()
    np.testing.assert_array_equal(wrapper(x), expected)
    assert wrapper.gain() is wrapper.gain()
    wrapper.m = 2 * wrapper.m
    bias = np.array(wrapper.base["bias"])
    np.testing.assert_allclose(wrapper(x) - bias, 2 * (expected - bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("packed", [False, True], ids=["float32", "4 bits"])
def test_no_dense_copy_of_the_weight_is_there(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither while m is made, nor in a step: blocks come one after the other, of which MLX prepares some ahead."""
    monkeypatch.setattr(dora, "BLOCK_BYTES", 1 << 20)
    side = 3072
    layer = nn.Linear(side, side, bias=False)
    layer = layer.to_quantized(group_size=64, bits=4) if packed else layer
    layer.freeze()
    mx.eval(layer.parameters())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    wrapper = dora.DoRA.from_base(layer, CONFIG, path="layer", key=mx.random.key(3))
    assert mx.get_active_memory() - before < 1 << 12, "making a wrapper evaluates nothing"
    mx.eval(wrapper.state)
    mx.eval(wrapper.gain())
    assert mx.get_peak_memory() - before < 0.7 * 4 * side * side


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_stored_adapter_computes_the_same_in_mlx_lm(name: str, tmp_path: Path) -> None:
    from mlx_lm.tuner.utils import load_adapters

    config = Adapter(method="dora", rank=RANK, alpha=6, targets=["q_proj", "down_proj"])
    tokens, model = mx.array([[5, 17, 3, 80, 41, 2, 9]]), network(name)
    bare = np.array(model(tokens))
    wrappers = attach(model, config)
    for wrapper in wrappers.values():
        wrapper.lora_b = 0.3 * mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(4))
        wrapper.m = wrapper.m * mx.random.uniform(0.5, 1.5, wrapper.m.shape, key=mx.random.key(5))
    manifest = Manifest(
        method="dora", adapter=config.model_dump(), modules=list(wrappers),
        scales={path: wrapper.scale for path, wrapper in wrappers.items()},
    )  # fmt: skip
    folder = save(tmp_path / "adapter", wrappers, manifest, layers=2)
    put(model, wrappers_for(model, read(folder)))
    theirs = load_adapters(network(name), str(folder)).eval()
    np.testing.assert_allclose(model(tokens), theirs(tokens), atol=5e-3)
    theirs.set_dtype(mx.float32)  # it multiplies the factors in bf16, as stored
    np.testing.assert_allclose(model(tokens), theirs(tokens), rtol=1e-4, atol=1e-4)
    assert not np.allclose(theirs(tokens), bare, atol=0.1)
