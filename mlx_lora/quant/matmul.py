"""Multiply by a quantized weight through temporary dequantized blocks, where MLX's own kernel is slow.

On a GPU `mx.quantized_matmul` is the fast path and nothing here is used. On the CPU backend it reaches 2 to 6
GFLOP/s, while dequantizing and calling BLAS reaches 60 and more from a few rows on. No dense copy may live until the
backward pass: the vjp dequantizes again, and `mx.depends` keeps a compiled graph from merging the two. Within a pass
the weight is unpacked a block of rows at a time, each block after the one before, because MLX evaluates independent
operations side by side and would hold all of them at once. Where a layer keeps a dense weight for generating
(`quant.dense`), that is used instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_lora.machine import device
from mlx_lora.quant.dense import dense_weight

# Below this many rows the packed weight is cheaper to read once than to unpack (measured on two cores).
FEW_ROWS = 3
# Bytes of a dequantized block: large enough for BLAS, small enough for the processor's cache and for a laptop.
BLOCK_BYTES = 8 << 20


def dequantize(
    weight: mx.array, scales: mx.array, biases: mx.array | None, *, group_size: int, bits: int, mode: str
) -> mx.array:
    """Dequantized float weight in the scales' dtype (float32 for the modes whose scales are integers)."""
    if biases is not None and 32 % bits == 0 and not device.on_gpu():
        return _unpacked(weight, scales, biases, group_size, bits)
    dtype = scales.dtype if biases is not None else mx.float32
    return mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits, mode=mode, dtype=dtype)


def _unpacked(weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int) -> mx.array:
    """scale · q + bias where a word of 32 bits holds whole numbers q: twice as fast as MLX's own on a CPU."""
    shifts = mx.arange(0, 32, bits, dtype=mx.uint32)
    values = mx.bitwise_and(mx.right_shift(weight[..., None], shifts), (1 << bits) - 1).astype(scales.dtype)
    groups = values.reshape(*scales.shape, group_size)
    return (groups * scales[..., None] + biases[..., None]).reshape(*weight.shape[:-1], -1)


Unpack = Callable[[Sequence[mx.array], slice], mx.array]


@lru_cache
def _by_blocks(unpack: Unpack) -> Callable[..., mx.array]:
    """y = x Wᵀ with W unpacked in the forward pass and again in the backward pass, never kept between them.

    Everything is an explicit input: a custom function's vjp gives silent zeros for what its closure holds.
    """

    def blocks(rows: int, columns: int) -> list[slice]:
        step = max(BLOCK_BYTES // (4 * columns), 1)
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def dense(packed: Sequence[mx.array], here: slice, after: mx.array) -> mx.array:
        """A block in the dtype of `after`, made only once `after` is there."""
        return unpack(mx.depends(list(packed), [after]), here).astype(after.dtype)

    @mx.custom_function  # type: ignore[untyped-decorator]
    def multiply(x: mx.array, *packed: mx.array) -> mx.array:
        parts, after = [], x
        for here in blocks(packed[0].shape[0], x.shape[-1]):
            after = x @ dense(packed, here, after).T
            parts.append(after)
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)

    @multiply.vjp  # type: ignore[untyped-decorator]
    def multiply_vjp(primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        x, *packed = primals
        rows = cotangent.reshape(-1, cotangent.shape[-1])
        total = None
        for here in blocks(packed[0].shape[0], x.shape[-1]):
            weight = dense(packed, here, rows if total is None else total)
            total = rows[:, here] @ weight if total is None else mx.addmm(total, rows[:, here], weight)
        assert total is not None
        frozen = tuple(mx.broadcast_to(mx.zeros((), array.dtype), array.shape) for array in packed)
        return (total.reshape(*cotangent.shape[:-1], -1), *frozen)

    return multiply  # type: ignore[return-value, no-any-return]


def multiply_unpacked(x: mx.array, packed: Sequence[mx.array], unpack: Unpack) -> mx.array:
    """x (…, in) times the transpose of a packed weight (out, in), giving (…, out) in x's dtype.

    `unpack` makes the float32 rows of a slice from the `packed` arrays, whose first has a row for every row of the
    weight. It must be the same function object every time, and hold no array that isn't constant.
    """
    return _by_blocks(unpack)(x, *packed)


@lru_cache
def _unpacking(group_size: int, bits: int, mode: str) -> Unpack:
    def unpack(packed: Sequence[mx.array], here: slice) -> mx.array:
        weight, scales, *biases = (array[here] for array in packed)
        if biases:  # dequantizing in half precision would round once more
            scales, biases = scales.astype(mx.float32), [biases[0].astype(mx.float32)]
        return dequantize(weight, scales, biases[0] if biases else None, group_size=group_size, bits=bits, mode=mode)

    return unpack


def multiply_transposed(x: mx.array, layer: nn.Module) -> mx.array:
    """x (…, in) times the transpose of a layer's weight (out, in) in one of MLX's modes; (…, out) in x's dtype."""
    if (weight := dense_weight(layer)) is not None:
        return x @ weight.T
    biases = layer.get("biases")
    if x.size // x.shape[-1] <= FEW_ROWS:
        settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
        return mx.quantized_matmul(x, layer["weight"], layer["scales"], biases, transpose=True, **settings)
    packed = [layer["weight"], layer["scales"], *([] if biases is None else [biases])]
    return multiply_unpacked(x, packed, _unpacking(layer.group_size, layer.bits, layer.mode))


class DequantizingLinear(nn.QuantizedLinear):
    """A QuantizedLinear for the CPU backend: the same arrays, another way to multiply."""

    def __call__(self, x: mx.array) -> mx.array:
        y = multiply_transposed(x, self)
        return y + self["bias"] if "bias" in self else y


class DequantizingEmbedding(nn.QuantizedEmbedding):
    """A QuantizedEmbedding for the CPU backend: float32 out, and BLAS where it serves as output head."""

    def __call__(self, x: mx.array) -> mx.array:
        scales, biases = self["scales"][x], self["biases"][x] if self.get("biases") is not None else None
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        settings = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
        return dequantize(self["weight"][x], scales, biases, **settings).astype(mx.float32)

    def as_linear(self, x: mx.array) -> mx.array:
        return multiply_transposed(x, self)


_FASTER: dict[type, type] = {nn.QuantizedLinear: DequantizingLinear, nn.QuantizedEmbedding: DequantizingEmbedding}


def use_fast_multiply(model: nn.Module) -> None:
    """Give every quantized layer of `model` the dequantizing multiply, and every other float array float32.

    For a CPU. The scales of those layers stay as they are stored, a tenth of a packed model: they are cast by block.
    """

    def faster(module: Any) -> Any:
        return like(module, _FASTER[type(module)]) if type(module) in _FASTER else module

    def cast(array: mx.array) -> mx.array:
        half = mx.issubdtype(array.dtype, mx.floating) and array.dtype != mx.float32
        return array.astype(mx.float32) if half else array

    def to_cast(module: nn.Module, key: str, value: Any) -> bool:
        packed = type(module) in _FASTER.values() and key in ("scales", "biases")
        return nn.Module.valid_parameter_filter(module, key, value) and not packed

    leaves = tree_map(faster, model.leaf_modules(), is_leaf=nn.Module.is_module)
    model.update_modules(leaves)
    model.apply(cast, to_cast)


def like(module: nn.Module, cls: type) -> Any:
    """A module of class `cls` holding the very same arrays and attributes as `module`."""
    twin: Any = cls.__new__(cls)  # type: ignore[call-overload]
    nn.Module.__init__(twin)
    twin.__dict__.update(module.__dict__)
    dict.update(twin, module)
    return twin
