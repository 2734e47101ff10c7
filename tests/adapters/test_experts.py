"""Stacks of experts: every method serves them or refuses by name, and gradients are those of a dense computation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora import methods
from mlx_lora.adapters.attach import attach, attached
from mlx_lora.adapters.base import EXPERTS
from mlx_lora.adapters.lora import LoRA, LoRASwitchLinear
from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError
from mlx_lora.models import QuantizedSwitchLinear, SwitchLinear
from mlx_lora.quant.quantize import dequantize_layer, quantize
from tests.models.tiny import mixed
from tests.models.tiny.build import build
from tests.models.tiny.plain import CONFIGS

FEW, MANY = mx.arange(1, 9)[None], mx.arange(1, 49)[None]  # mlx_lm sorts rows by expert from 64 choices on
BASES: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "affine": {"mode": "affine", "bits": 4, "group_size": 32},
    "mxfp4": {"mode": "mxfp4", "bits": 4, "group_size": 32},
    "nf4": {"mode": "nf4", "bits": 4, "group_size": 32},
}
# Why a method can't serve experts; on which bases, where that isn't all of them. prefix and prompt have other places.
REFUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    "glora": ("GLoRA is for linear layers", tuple(BASES)),
    "qalora": ("has no zero-points", ("mxfp4", "nf4")),
    "full": ("is packed and can't train", ("affine", "mxfp4", "nf4")),
}
METHODS = [name for name in methods.METHODS if name not in ("prefix", "prompt")]


def model_of(base: str) -> nn.Module:
    """gpt_oss: three stacks of experts with biases in every layer."""
    model = build("gpt_oss", CONFIGS["gpt_oss"])
    if quantization := BASES[base]:
        quantize(model, quantization)
    model.freeze()
    return model


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_serves_experts_or_refuses_them_by_name(name: str, base: str) -> None:
    model = model_of(base)
    config = Adapter(method=name, targets=["gate_proj", "up_proj", "down_proj"])
    reason, bases = REFUSED.get(name, ("", ()))
    if base in bases:
        with pytest.raises(AdapterError, match=reason):
            attach(model, config)
        assert not attached(model)
        return
    bare = np.array(model(MANY))
    wrappers = attach(model, config)
    assert all(isinstance(wrapper.base, EXPERTS) for wrapper in wrappers.values())
    # a BLAS may add in another order where its arrays lie elsewhere in memory
    np.testing.assert_allclose(np.array(model(MANY)), bare, rtol=0, atol=1e-5)
    for number, wrapper in enumerate(wrappers.values()):
        for key, array in wrapper.adapter_arrays().items():
            wrapper[key] = array + 0.05 * mx.random.normal(array.shape, key=mx.random.key(number))
    for tokens in (FEW, MANY):
        _, gradients = nn.value_and_grad(model, lambda tokens=tokens: model(tokens).square().mean())()
        flat = dict(tree_flatten(gradients))
        assert flat and all(bool(mx.isfinite(array).all().item()) for array in flat.values())
        assert all(bool(array.any().item()) for array in flat.values())


def _stack(bias: bool, packed: bool) -> nn.Module:
    mx.random.seed(3)
    layer = SwitchLinear(32, 24, 5, bias=bias)
    if bias:
        layer.bias = mx.random.normal((5, 24))
    stack: nn.Module = layer.to_quantized(group_size=32, bits=4, mode="mxfp4") if packed else layer
    assert isinstance(stack, QuantizedSwitchLinear if packed else SwitchLinear)
    stack.freeze()
    return stack


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "mxfp4"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("ordered", [False, True], ids=["as they come", "sorted"])
@pytest.mark.parametrize("method", ["lora", "dora", "vera", "adalora", "ia3", "bitfit"])
def test_gradients_on_experts_are_those_of_a_dense_computation(
    method: str, ordered: bool, bias: bool, packed: bool
) -> None:
    """The dense side multiplies each row by its expert's own merged weight, whose update is differentiable."""
    layer = _stack(bias, packed)
    kind: Any = methods.resolve(method)
    config = Adapter(method=method, **({"rank": 4} if method in methods.LOW_RANK else {}))
    wrapper = kind.from_base(layer, config, path="up_proj", key=mx.random.key(0))
    for number, (key, array) in enumerate(wrapper.adapter_arrays().items()):
        wrapper[key] = array + 0.1 * mx.random.normal(array.shape, key=mx.random.key(number))
    indices = mx.random.randint(0, 5, (96,), key=mx.random.key(5))
    indices = mx.sort(indices) if ordered else indices
    x, cotangent = (mx.random.normal((96, 1, width), key=mx.random.key(width)) for width in (32, 24))
    weight = dequantize_layer(layer, mx.float32)

    def gathered(arrays: dict[str, mx.array], x: mx.array) -> mx.array:
        wrapper.update(arrays)
        return (wrapper(x, indices, sorted_indices=ordered) * cotangent).sum()

    def dense(arrays: dict[str, mx.array], x: mx.array) -> mx.array:
        wrapper.update(arrays)
        y = x @ (weight + wrapper.delta())[indices].swapaxes(-1, -2)
        shift = layer["bias"] if bias else mx.zeros((5, 24))
        shift = shift + wrapper.shift if method == "bitfit" else shift * wrapper.vector if method == "ia3" else shift
        return ((y + shift[indices][:, None]) * cotangent).sum()

    _agree(gathered, dense, wrapper.adapter_arrays(), x)


def _agree(one: Callable[..., mx.array], other: Callable[..., mx.array], arrays: Any, x: mx.array) -> None:
    results = [mx.value_and_grad(function, argnums=(0, 1))(arrays, x) for function in (one, other)]
    (value, (found, entering)), (expected, (wanted, also_entering)) = results
    np.testing.assert_allclose(np.array(value), np.array(expected), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(np.array(entering), np.array(also_entering), rtol=1e-3, atol=1e-3)
    for name in arrays:
        np.testing.assert_allclose(
            np.array(found[name]),
            np.array(wanted[name]),
            rtol=1e-3,
            atol=1e-3 * float(mx.abs(wanted[name]).max().item()),
        )


def test_rank_is_per_expert_and_routers_stay_frozen() -> None:
    model = model_of("mxfp4")
    wrappers = attach(model, Adapter(targets="all-linear", rank=2))
    stack = wrappers["model.layers.0.mlp.experts.up_proj"]
    assert isinstance(stack, LoRA) and stack.lora_a.shape[:2] == (stack.base["weight"].shape[0], 2)
    assert not any("router" in name for name, _ in tree_flatten(model.trainable_parameters()))


@pytest.mark.real
def test_no_model_reaches_its_experts_past_their_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stack of every architecture is called: a model that multiplies by the weights itself would pass by it."""
    called: set[int] = set()
    plain_call = LoRASwitchLinear.__call__

    def call(self: LoRASwitchLinear, *arguments: Any, **sorting: bool) -> mx.array:
        called.add(id(self))
        return plain_call(self, *arguments, **sorting)

    monkeypatch.setattr(LoRASwitchLinear, "__call__", call)
    stacks = 0
    for name, settings in {**CONFIGS, **mixed.CONFIGS}.items():
        model = build(name, settings)
        paths = [path for path, module in model.named_modules() if isinstance(module, EXPERTS)]
        called.clear()
        if paths:
            wrappers = attach(model, Adapter(rank=1, targets=paths))
            model(FEW)
            assert [path for path, wrapper in wrappers.items() if id(wrapper) not in called] == [], name
            stacks += len(paths)
    assert stacks > 100
