"""QA-LoRA's own promise: the update merges into the zero-points, and what is packed stays as it is."""

from __future__ import annotations

import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_lora.adapters.qalora import GROUP_SIZE, QALoRA
from mlx_lora.config import Adapter
from mlx_lora.models import SwitchLinear
from mlx_lora.quant.matmul import DequantizingLinear, like
from mlx_lora.quant.quantize import dequantize_layer, packed_layer

OUT, IN, RANK = 48, 256, 3
CONFIG = Adapter(method="qalora", rank=RANK, alpha=6)
CHOSEN = mx.array([[[0, 3], [1, 1], [2, 0]], [[2, 3], [1, 0], [3, 2]]])


def plain(kind: str) -> nn.Module:
    if kind == "experts":
        return SwitchLinear(IN, OUT, 4, bias=True)
    layer = nn.Linear(IN, OUT)
    layer.weight = mx.random.normal((OUT, IN), scale=IN**-0.5, key=mx.random.key(1))
    return layer


def packed(kind: str, bits: int, group_size: int, dtype: mx.Dtype = mx.float32) -> nn.Module:
    layer = plain(kind).to_quantized(group_size=group_size, bits=bits)
    layer.set_dtype(dtype)
    return like(layer, DequantizingLinear) if kind == "linear on a CPU" else layer


def trained(layer: nn.Module) -> QALoRA:
    """A wrapper whose update is a tenth of the weight, in evaluation."""
    wrapper = QALoRA.from_base(layer, CONFIG, path="layer", key=mx.random.key(2))
    wrapper.lora_b = mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(3))
    size = mx.linalg.norm(dequantize_layer(layer, mx.float32)) / mx.linalg.norm(wrapper.delta())
    wrapper.lora_b = 0.1 * size * wrapper.lora_b
    wrapper.eval()
    return wrapper


def run(module: nn.Module, kind: str, dtype: mx.Dtype = mx.float32) -> mx.array:
    x = mx.random.normal((2, 3, IN), key=mx.random.key(4)).astype(dtype)
    return module(x[..., None, None, :], CHOSEN) if kind == "experts" else module(x)


def difference(found: mx.array, expected: mx.array) -> float:
    """The largest difference, relative to the largest value."""
    ours, theirs = (np.array(array.astype(mx.float32), np.float64) for array in (found, expected))
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize(
    ("kind", "bits", "group_size"),
    [("linear", 4, 32), ("linear", 4, 64), ("linear", 2, 128), ("linear", 3, 64), ("linear", 8, 64),
     ("linear on a CPU", 4, 64), ("linear on a CPU", 6, 32), ("experts", 4, 64), ("experts", 5, 32)],
)  # fmt: skip
def test_merged_zero_points_say_what_the_unmerged_layer_says(kind: str, bits: int, group_size: int) -> None:
    base = packed(kind, bits, group_size)
    stored = {name: np.array(base[name]) for name in ("weight", "scales", "biases")}
    wrapper = trained(base)
    merged = wrapper.fuse_packed()
    assert merged is not None and type(merged) is type(base)
    assert difference(run(merged, kind), run(wrapper, kind)) < 1e-5
    assert difference(run(base, kind), run(wrapper, kind)) > 1e-2, "the update is too small to show anything"
    assert merged["weight"] is base["weight"] and merged["scales"] is base["scales"]
    for name, array in stored.items():
        np.testing.assert_array_equal(base[name], array, err_msg="the base has changed")


@pytest.mark.parametrize(("dtype", "most"), [(mx.float16, 1e-3), (mx.bfloat16, 1e-2)], ids=["float16", "bfloat16"])
def test_half_precision_rounds_the_zero_points_once_and_promotes_nothing(dtype: mx.Dtype, most: float) -> None:
    """Float32 zero-points beside half-precision scales would turn every output into float32.

    Computed in float32, what differs is that one rounding: a CPU's half-precision arithmetic loses ten times as much.
    """
    wrapper = trained(like(packed("linear", 4, 64, dtype), DequantizingLinear))
    merged = wrapper.fuse_packed()
    assert merged is not None and merged["biases"].dtype == dtype
    assert run(like(merged, nn.QuantizedLinear), "linear", dtype).dtype == dtype
    wrapper.base["bias"] = merged["bias"] = merged["bias"].astype(mx.float32)
    assert difference(run(merged, "linear"), run(wrapper, "linear")) < most


def test_the_update_is_the_scaled_product_of_pooled_inputs() -> None:
    wrapper = trained(packed("linear", 4, 64))
    x = np.array(mx.random.normal((5, IN), key=mx.random.key(5)), np.float64)
    a, b = np.array(wrapper.lora_a, np.float64), np.array(wrapper.lora_b, np.float64)
    assert a.shape == (IN // 64, RANK)
    expected = 2.0 * (x.reshape(5, -1, 64).mean(axis=-1) @ a @ b)
    found = wrapper(mx.array(x)) - wrapper.base(mx.array(x))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(x @ np.array(wrapper.delta(), np.float64).T, expected, rtol=1e-4, atol=1e-5)


def test_a_plain_layer_has_groups_but_nothing_packed() -> None:
    wrapper = trained(plain("linear"))
    assert wrapper.lora_a.shape == (IN // GROUP_SIZE, RANK)
    assert wrapper.fuse_packed() is None
    groups = np.array(wrapper.delta()).reshape(OUT, -1, GROUP_SIZE)
    np.testing.assert_array_equal(groups, np.broadcast_to(groups[..., :1], groups.shape))


@pytest.mark.parametrize(
    ("mode", "bits", "group_size"), [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16), ("nf4", 4, 64)]
)
def test_modes_without_zero_points_are_refused_with_what_works(mode: str, bits: int, group_size: int) -> None:
    layer = packed_layer(nn.Linear(64, 8), {"mode": mode, "bits": bits, "group_size": group_size})
    assert QALoRA.refusal(layer, CONFIG, "a.q_proj") == (
        f"a.q_proj is quantized to {mode}, which has no zero-points; quantize.mode affine or method lora works"
    )


@pytest.mark.parametrize(
    ("layer", "fault"),
    [
        (nn.Linear(48, 8), "48 inputs, which groups of 32 don't divide"),
        (nn.Embedding(64, 64), "an embedding, whose inputs are tokens"),
        (nn.Embedding(64, 64).to_quantized(), "an embedding, whose inputs are tokens"),
        (nn.Conv1d(32, 8, 3), "of type Conv1d"),
    ],
    ids=["48 inputs", "embedding", "packed embedding", "convolution"],
)
def test_other_layers_are_refused_with_what_works(layer: nn.Module, fault: str) -> None:
    reason = QALoRA.refusal(layer, CONFIG, "a.q_proj")
    assert reason is not None and re.search(f"a.q_proj.*{fault}.*; method lora works", reason)


@pytest.mark.parametrize("layer", [packed("linear", 3, 128), packed("experts", 4, 32), plain("linear")])
def test_linear_layers_and_experts_are_served(layer: nn.Module) -> None:
    assert QALoRA.refusal(layer, CONFIG, "layer") is None
