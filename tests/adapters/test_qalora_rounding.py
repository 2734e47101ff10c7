"""Training through the rounding of zero-points: values, gradients and what is stored, beside numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora.adapters.qalora import QALoRA
from mlx_lora.config import Adapter
from mlx_lora.models import SwitchLinear
from mlx_lora.models.trunk.recompute import recomputed
from mlx_lora.quant.matmul import DequantizingLinear, like
from mlx_lora.quant.quantize import dequantize_layer
from mlx_lora.quant.zero_points import added
from mlx_lora.store.adapter import Manifest, read, save
from mlx_lora.store.manifest import MANIFEST, read_manifest

OUT, IN, RANK, EXPERTS = 48, 256, 3, 4
CONFIG = Adapter(method="qalora", rank=RANK, alpha=6)
CHOSEN = np.array([[[0, 3], [1, 1], [2, 0]], [[2, 3], [1, 0], [3, 2]]])
KINDS = [("linear", mx.float16), ("linear", mx.bfloat16), ("experts", mx.float16), ("experts", mx.bfloat16)]
IDS = [f"{kind} {str(dtype).rpartition('.')[2]}" for kind, dtype in KINDS]
# Of a float32's mantissa: what a zero-point in half precision lacks.
LOST = {mx.float16: 13, mx.bfloat16: 16}


def base(kind: str, dtype: mx.Dtype) -> nn.Module:
    """A 4-bit layer whose scales and zero-points are in `dtype`."""
    mx.random.seed(1)
    layer: Any = SwitchLinear(IN, OUT, EXPERTS, bias=False) if kind == "experts" else nn.Linear(IN, OUT, bias=False)
    packed = layer.to_quantized(group_size=32, bits=4)
    packed.set_dtype(dtype)
    packed.freeze()
    return packed if kind == "experts" else like(packed, DequantizingLinear)


def trained(layer: nn.Module, config: Adapter = CONFIG, *, strength: float = 2e-4) -> QALoRA:
    """A wrapper whose update of the zero-points is a part of the distance between two of them."""
    wrapper = QALoRA.from_base(layer, config, path="layer", key=mx.random.key(2))
    wrapper.lora_b = mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(3))
    a, b = wrapper.masters()
    wrapper.lora_b = wrapper.lora_b * (strength * 32 / wrapper.scale / mx.sqrt(mx.mean(mx.square(a @ b))))
    return wrapper


def inputs(kind: str) -> tuple[mx.array, ...]:
    x = mx.random.normal((2, 3, IN), key=mx.random.key(4))
    return (x[..., None, None, :], mx.array(CHOSEN)) if kind == "experts" else (x,)


def thresholds(shape: tuple[int, ...]) -> np.ndarray:
    steps = (0xC13FA9A9, 0x91E10DA5, 0x9E3779B9)[: len(shape)]
    grid = np.meshgrid(*[np.arange(length, dtype=object) for length in shape], indexing="ij")
    total = sum((grid[-1 - axis] * step for axis, step in enumerate(steps)), start=np.full(shape, 1 << 31, object))
    return (total % 2**32).astype(np.float64) / 2**32


def rounded(values: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """Each of `values` to one of its two neighbours among the numbers of `dtype`, by its threshold; float64."""
    _, exponent = np.frexp(np.abs(values))
    step = np.ldexp(1.0, exponent - 24 + LOST[dtype])  # between numbers of this exponent
    lower = np.floor(np.abs(values) / step) * step
    fraction = (np.abs(values) - lower) / step
    up = np.floor(fraction * 2 ** LOST[dtype]) + np.floor(thresholds(values.shape) * 2 ** LOST[dtype])
    return np.sign(values) * (lower + step * (up >= 2 ** LOST[dtype]))


def numpy64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32), np.float64)


def expected(wrapper: QALoRA, kind: str, cotangent: np.ndarray) -> dict[str, np.ndarray]:
    """Output and straight-through gradients of Σ cotangent · y, in float64 and one expert at a time."""
    layer, length = wrapper.base, wrapper.group_size
    weight, zero = numpy64(dequantize_layer(layer, mx.float32)), numpy64(layer["biases"])
    a, b = (numpy64(array) for array in wrapper.masters())
    x = numpy64(inputs(kind)[0])
    if kind != "experts":
        weight, zero, a, b = weight[None], zero[None], a[None], b[None]
    u = (np.float32(wrapper.scale / length) * (a.astype(np.float32) @ b.astype(np.float32))).swapaxes(1, 2)
    total = (zero.astype(np.float32) + u).astype(np.float64)
    merged = rounded(total if kind == "experts" else total[0], layer["biases"].dtype).reshape(zero.shape)
    whole = weight + np.repeat(merged - zero, length, axis=2)
    rows = x.reshape(-1, IN)
    chosen = CHOSEN.reshape(6, 2) if kind == "experts" else np.zeros((6, 1), int)
    found = {"y": np.zeros((6, chosen.shape[1], OUT)), "x": np.zeros_like(rows), "a": 0 * a, "b": 0 * b}
    back = cotangent.reshape(6, chosen.shape[1], OUT)
    for row, experts in enumerate(chosen):
        for slot, e in enumerate(experts):
            found["y"][row, slot] = whole[e] @ rows[row]
            found["x"][row] += back[row, slot] @ whole[e]
            pooled = rows[row].reshape(-1, length).mean(axis=1)
            of_update = wrapper.scale * np.outer(pooled, back[row, slot])  # of A B, the rounding left out
            found["a"][e] += of_update @ b[e].T
            found["b"][e] += a[e].T @ of_update
    return found


def gradients(wrapper: QALoRA, kind: str, cotangent: mx.array) -> tuple[mx.array, Any, mx.array]:
    x, *rest = inputs(kind)

    def loss(parameters: Any, x: mx.array) -> mx.array:
        wrapper.update(parameters)
        return (wrapper(x, *rest) * cotangent).sum()

    before = wrapper.trainable_parameters()
    value, (of_parameters, of_x) = mx.value_and_grad(loss, argnums=(0, 1))(before, x)
    wrapper.update(before)
    return value, of_parameters, of_x


@pytest.mark.parametrize(("kind", "dtype"), KINDS, ids=IDS)
def test_values_and_gradients_are_those_of_numpy(kind: str, dtype: mx.Dtype) -> None:
    wrapper = trained(base(kind, dtype))
    assert wrapper.rounds
    y = wrapper(*inputs(kind))
    cotangent = mx.random.normal(y.shape, key=mx.random.key(6))
    wanted = expected(wrapper, kind, np.array(cotangent))
    _, found, of_x = gradients(wrapper, kind, cotangent)
    a, b = found["lora_a"], found["lora_b"]
    if kind == "experts":
        a, b = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
    pairs = {"y": y, "x": of_x, "a": a, "b": b}
    for name, array in pairs.items():
        ours, theirs = np.array(array).reshape(-1), wanted[name].reshape(-1)
        np.testing.assert_allclose(ours, theirs, atol=2e-6 * np.abs(theirs).max(), err_msg=name)
    update = numpy64(y) - numpy64(wrapper.base(*inputs(kind)))
    assert np.abs(update).max() > 1e-4, "the update is too small to show anything"


def test_without_rounding_the_gradient_is_the_product_s_own() -> None:
    """A plain base, or zero-points in float32, have nothing to round."""
    for layer in (nn.Linear(IN, OUT), base("linear", mx.float32)):
        wrapper = trained(layer, strength=1e-3)
        assert not wrapper.rounds
        x, a, b = (numpy64(array) for array in (*inputs("linear"), wrapper.lora_a, wrapper.lora_b))
        cotangent = mx.random.normal((2, 3, OUT), key=mx.random.key(6))
        _, found, _ = gradients(wrapper, "linear", cotangent)
        pooled = x.reshape(6, -1, 32).mean(axis=2)
        of_update = wrapper.scale * pooled.T @ np.array(cotangent, np.float64).reshape(6, OUT)
        np.testing.assert_allclose(found["lora_a"], of_update @ b.T, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found["lora_b"], a.T @ of_update, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "dtype"), KINDS, ids=IDS)
def test_what_was_trained_is_what_is_merged_bit_for_bit(kind: str, dtype: mx.Dtype, tmp_path: Path) -> None:
    """In training, frozen, and read again from disk: the same zero-points, and the outputs of the merged layer."""
    wrapper = trained(base(kind, dtype))
    merged = wrapper.fuse_packed()
    assert merged is not None and merged["biases"].dtype == dtype
    assert merged["weight"] is wrapper.base["weight"] and merged["scales"] is wrapper.base["scales"]
    changed = np.array(merged["biases"].astype(mx.float32)) != np.array(wrapper.base["biases"].astype(mx.float32))
    assert 0.1 < changed.mean() < 1
    outputs = {"training": wrapper(*inputs(kind)), "merged": merged(*inputs(kind))}
    wrapper.freeze()
    outputs["frozen"] = wrapper(*inputs(kind))
    for name, array in outputs.items():
        np.testing.assert_allclose(array, outputs["training"], atol=2e-6, err_msg=name)
    again = stored_and_read(wrapper, tmp_path)
    np.testing.assert_array_equal(
        *(np.array(layer.fuse_packed()["biases"].astype(mx.float32)) for layer in (wrapper, again))  # type: ignore[index]
    )
    np.testing.assert_array_equal(np.array(again(*inputs(kind))), np.array(outputs["frozen"]))


def stored_and_read(wrapper: QALoRA, tmp_path: Path) -> QALoRA:
    manifest = Manifest(
        method="qalora", adapter=CONFIG.model_dump(), modules=["layer"], scales={"layer": wrapper.scale}
    )
    stored = read(save(tmp_path / "adapter", {"layer": wrapper}, manifest, layers=1))
    again = QALoRA.from_base(wrapper.base, CONFIG, path="layer", key=mx.random.key(9))
    for name in again.adapter_params():
        again[name] = stored.arrays[f"layer.{name}"]
    again.freeze()
    return again


def test_a_frozen_wrapper_follows_its_arrays() -> None:
    """The merged zero-points are kept between calls, until the arrays are others."""
    wrapper = trained(base("linear", mx.float16))
    wrapper.freeze()
    before = wrapper(*inputs("linear"))
    assert mx.array_equal(wrapper(*inputs("linear")), before)
    wrapper.lora_b = -wrapper.lora_b
    after = wrapper(*inputs("linear"))
    plain = wrapper.base(*inputs("linear"))
    assert mx.abs(after - before).max() > mx.abs(before - plain).max()


class Block(nn.Module):
    """A layer around the wrapper that chooses the experts, as gradient checkpointing meets it."""

    def __init__(self, wrapper: QALoRA, kind: str):
        super().__init__()
        self.wrapper, self._kind = wrapper, kind

    def __call__(self, x: mx.array) -> mx.array:
        return self.wrapper(x, *inputs(self._kind)[1:])


@pytest.mark.parametrize(("kind", "dtype"), KINDS[1:3], ids=IDS[1:3])
def test_compiled_and_recomputed_gradients_are_the_same(kind: str, dtype: mx.Dtype) -> None:
    """With dropout, whose mask of the pooled inputs is the same in both passes."""
    block = Block(trained(base(kind, dtype), CONFIG.model_copy(update={"dropout": 0.3})), kind)
    x = inputs(kind)[0]
    cotangent = mx.random.normal(block(x).shape, key=mx.random.key(6))

    def step(x: mx.array) -> tuple[mx.array, Any]:
        def loss(parameters: Any, x: mx.array) -> mx.array:
            block.update(parameters)
            return (block(x) * cotangent).sum()

        before = block.trainable_parameters()
        found = mx.value_and_grad(loss, argnums=(0, 1))(before, x)
        block.update(before)
        return found  # type: ignore[no-any-return]

    def flat(found: Any) -> list[np.ndarray]:
        return [np.array(array) for _, array in tree_flatten(found)]

    mx.random.seed(5)
    key = mx.random.randint(0, 2**31, (2,)).astype(mx.uint32)  # as checkpointing draws it
    block.wrapper.dropout.drawn_from(key)
    plain, compiled = flat(step(x)), flat(mx.compile(step, inputs=[block.state])(x))
    mx.random.seed(5)
    with recomputed([block]):
        again = flat(step(x))
    block.wrapper.dropout.drawn_from(mx.random.key(99))
    others = flat(step(x))
    for number, array in enumerate(plain):
        np.testing.assert_allclose(compiled[number], array, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(again[number], array, rtol=2e-5, atol=2e-5)
    assert not np.allclose(others[1], plain[1], rtol=1e-2)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_the_mean_of_an_update_far_below_the_spacing_remains(dtype: mx.Dtype) -> None:
    """Nearest rounding leaves nothing of an update of a tenth of the spacing."""
    zero = mx.random.uniform(-0.9, -0.3, (64, 48), key=mx.random.key(1)).astype(dtype)
    for sign in (1, -1):
        update = sign * 2.0 ** (-12 if dtype == mx.float16 else -9) / 10  # spacings are this one and its double
        moved = numpy64(added(zero, mx.full(zero.shape, update))) - numpy64(zero)
        assert moved.mean() == pytest.approx(update, rel=0.05)
        assert np.abs(moved.mean(axis=1) / update - 1).max() < 1  # so in every row of 48
        assert mx.array_equal((zero.astype(mx.float32) + update).astype(dtype), zero)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_no_update_changes_nothing_and_float32_is_not_rounded(dtype: mx.Dtype) -> None:
    values = [0.0, -0.0, 1.0, -1.0, 0.5, -0.25, 6e-5, -6e-8, 3e-3, -3.0, 60000.0, 2.0**-14, -(2.0**-15)]
    zero = mx.broadcast_to(mx.array(values)[:, None], (len(values), 64)).astype(dtype)
    assert mx.array_equal(added(zero, mx.zeros(zero.shape)), zero)
    assert added(zero, mx.zeros(zero.shape)).dtype == dtype
    wide = zero.astype(mx.float32)
    assert mx.array_equal(added(wide, mx.full(wide.shape, 1e-7)), wide + 1e-7)


def test_an_adapter_of_an_older_version_isn_t_rounded(tmp_path: Path) -> None:
    import json

    wrapper = trained(base("linear", mx.float16))
    manifest = Manifest(method="qalora", adapter=CONFIG.model_dump(), modules=["layer"], scales={"layer": 2.0})
    path = save(tmp_path / "adapter", {"layer": wrapper}, manifest, layers=1)
    assert read_manifest(path).adapter["zero_points"] == "stored"
    values = json.loads((path / MANIFEST).read_text())
    del values["adapter"]["zero_points"]
    (path / MANIFEST).write_text(json.dumps(values))
    settings = Adapter.model_validate(read_manifest(path).adapter)
    assert settings.zero_points == "float32"
    older = QALoRA.from_base(wrapper.base, settings, path="layer", key=mx.random.key(2))
    assert not older.rounds
