"""What is IA³'s own: where the vector multiplies, and merging into an affine base's scales."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_lora.adapters.ia3 import IA3, is_feed_forward
from mlx_lora.config import Adapter
from mlx_lora.models import SwitchLinear
from mlx_lora.quant.quantize import dequantize_layer

OUT, IN, EXPERTS = 32, 64, 4
CONFIG = Adapter(method="ia3")


def linear() -> nn.Module:
    layer = nn.Linear(IN, OUT)
    layer.weight = mx.random.normal((OUT, IN), key=mx.random.key(1))
    layer.bias = mx.random.normal((OUT,), key=mx.random.key(2))
    return layer


def experts() -> nn.Module:
    layer = SwitchLinear(IN, OUT, EXPERTS)
    layer.bias = mx.random.normal((EXPERTS, OUT), key=mx.random.key(2))
    return layer


def wrap(layer: nn.Module, path: str) -> IA3:
    wrapper = IA3.from_base(layer, CONFIG, path=path, key=mx.random.key(0))
    wrapper.vector = mx.random.uniform(0.5, 1.5, wrapper.vector.shape, key=mx.random.key(3))
    return wrapper


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("model.layers.0.mlp.down_proj", True),
        ("model.layers.0.mlp.switch_mlp.down_proj", True),
        ("model.layers.3.feed_forward.w2", True),
        ("transformer.h.0.mlp.c_proj", True),
        ("transformer.h.0.attn.c_proj", False),
        ("model.layers.0.self_attn.k_proj", False),
        ("model.layers.0.mlp.up_proj", False),
    ],
)
def test_the_last_linear_of_an_mlp_is_known_by_its_path(path: str, expected: bool) -> None:
    assert is_feed_forward(path) is expected


def test_attention_has_its_outputs_multiplied_and_the_mlp_its_inputs() -> None:
    x = mx.random.normal((5, IN), key=mx.random.key(4))
    weight, bias = np.array(linear().weight), np.array(linear().bias)
    value, down = wrap(linear(), "self_attn.v_proj"), wrap(linear(), "mlp.down_proj")
    assert (value.vector.shape, down.vector.shape) == ((OUT,), (IN,))
    vector = np.array(value.vector)
    np.testing.assert_allclose(value(x), (np.array(x) @ weight.T + bias) * vector, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(down(x), (np.array(x) * np.array(down.vector)) @ weight.T + bias, rtol=1e-4, atol=1e-4)
    for wrapper in (value, down):
        np.testing.assert_allclose(wrapper.fuse()(x), wrapper(x), rtol=1e-4, atol=1e-4)
        update = np.array(wrapper.fuse().weight) - weight
        np.testing.assert_allclose(wrapper.delta(), update, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sort", [False, True], ids=["as routed", "sorted by expert"])
@pytest.mark.parametrize("path", ["mlp.down_proj", "mlp.up_proj"])
def test_every_expert_has_a_vector_of_its_own(path: str, sort: bool) -> None:
    wrapper, chosen = wrap(experts(), path), mx.array([[0, 3], [1, 1], [2, 0]])
    x = mx.random.normal((3, 1, 1, IN), key=mx.random.key(4))
    if sort:
        chosen, x = mx.array([0, 0, 1, 3]), mx.random.normal((4, 1, IN), key=mx.random.key(4))
    expected = wrapper.fuse()(x, chosen, sorted_indices=sort)
    np.testing.assert_allclose(wrapper(x, chosen, sorted_indices=sort), expected, rtol=1e-4, atol=1e-4)
    assert not np.allclose(expected, wrapper.base(x, chosen, sorted_indices=sort), atol=1e-2)


@pytest.mark.parametrize("layer", [linear, experts])
def test_outputs_merge_into_the_scales_of_an_affine_base(layer: type) -> None:
    packed = layer().to_quantized(group_size=32, bits=4)
    wrapper, scales = wrap(packed, "self_attn.k_proj"), np.array(packed["scales"])
    fused = wrapper.fuse_packed()
    assert fused is not None and type(fused) is type(packed)
    np.testing.assert_array_equal(fused["weight"], packed["weight"])
    expected = np.array(dequantize_layer(packed, mx.float32)) + np.array(wrapper.delta())
    np.testing.assert_allclose(dequantize_layer(fused, mx.float32), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(fused["bias"], np.array(packed["bias"]) * np.array(wrapper.vector), rtol=1e-6)
    np.testing.assert_array_equal(packed["scales"], scales, err_msg="the base changed")


def test_inputs_and_other_formats_have_no_packed_merge() -> None:
    assert wrap(linear().to_quantized(group_size=32, bits=4), "mlp.down_proj").fuse_packed() is None
    assert wrap(linear().to_quantized(group_size=32, bits=4, mode="mxfp4"), "k_proj").fuse_packed() is None
    assert wrap(linear(), "self_attn.k_proj").fuse_packed() is None
