"""Multiply by a quantized weight through a temporary dequantized copy, where MLX's own kernel is slow.

On a GPU `mx.quantized_matmul` is the fast path and nothing here is used. On the CPU backend it reaches 2 to 6
GFLOP/s, while dequantizing and calling BLAS reaches 60 and more from a few rows on. The copy must not live until the
backward pass: the vjp dequantizes again, and `mx.depends` keeps a compiled graph from merging the two.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_lora import device

# Below this many rows the packed weight is cheaper to read once than to unpack (measured on two cores).
FEW_ROWS = 3


def dequantize(
    weight: mx.array, scales: mx.array, biases: mx.array | None, *, group_size: int, bits: int, mode: str
) -> mx.array:
    """Dequantized float weight in the scales' dtype (float32 for the modes whose scales are integers)."""
    dtype = scales.dtype if biases is not None else mx.float32
    return mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits, mode=mode, dtype=dtype)


@lru_cache
def _dequantizing_multiply(group_size: int, bits: int, mode: str) -> Callable[..., mx.array]:
    """y = x Wᵀ with W dequantized in the forward pass and again in the backward pass, never kept between them.

    Everything is an explicit input: a custom function's vjp gives silent zeros for what its closure holds.
    """

    def unpack(weight: mx.array, scales: mx.array, biases: tuple[mx.array, ...], after: mx.array) -> mx.array:
        (weight,) = mx.depends([weight], [after])
        bias = biases[0] if biases else None
        return dequantize(weight, scales, bias, group_size=group_size, bits=bits, mode=mode).astype(after.dtype)

    @mx.custom_function  # type: ignore[untyped-decorator]
    def multiply(x: mx.array, weight: mx.array, scales: mx.array, *biases: mx.array) -> mx.array:
        return x @ unpack(weight, scales, biases, x).T

    @multiply.vjp  # type: ignore[untyped-decorator]
    def multiply_vjp(primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        _, weight, scales, *biases = primals
        frozen = tuple(mx.zeros_like(array) for array in primals[1:])
        return (cotangent @ unpack(weight, scales, tuple(biases), cotangent), *frozen)

    return multiply  # type: ignore[return-value, no-any-return]


def multiply_transposed(x: mx.array, layer: nn.Module) -> mx.array:
    """x (…, in) times the transpose of a quantized layer's weight (out, in), giving (…, out) in x's dtype."""
    biases = layer.get("biases")
    if x.size // x.shape[-1] <= FEW_ROWS:
        settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
        return mx.quantized_matmul(x, layer["weight"], layer["scales"], biases, transpose=True, **settings)
    multiply = _dequantizing_multiply(layer.group_size, layer.bits, layer.mode)
    return multiply(x, layer["weight"], layer["scales"], *([] if biases is None else [biases]))


class DequantizingLinear(nn.QuantizedLinear):
    """A QuantizedLinear for the CPU backend: the same arrays, another way to multiply."""

    def __call__(self, x: mx.array) -> mx.array:
        y = multiply_transposed(x, self)
        return y + self["bias"] if "bias" in self else y


class DequantizingEmbedding(nn.QuantizedEmbedding):
    """A QuantizedEmbedding for the CPU backend, whose use as output head goes through BLAS.

    The modes without zero-points unpack to bfloat16; its values are taken to float32 as they are.
    """

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x).astype(mx.float32)

    def as_linear(self, x: mx.array) -> mx.array:
        return multiply_transposed(x, self)


_FASTER: dict[type, type] = {nn.QuantizedLinear: DequantizingLinear, nn.QuantizedEmbedding: DequantizingEmbedding}


def use_fast_multiply(model: nn.Module) -> None:
    """On a CPU, give every quantized layer of `model` the dequantizing multiply; on a GPU do nothing."""
    if device.on_gpu():
        return

    def faster(module: Any) -> Any:
        return like(module, _FASTER[type(module)]) if type(module) in _FASTER else module

    leaves = tree_map(faster, model.leaf_modules(), is_leaf=nn.Module.is_module)
    model.update_modules(leaves)


def like(module: nn.Module, cls: type) -> Any:
    """A module of class `cls` holding the very same arrays and attributes as `module`."""
    twin: Any = cls.__new__(cls)  # type: ignore[call-overload]
    nn.Module.__init__(twin)
    twin.__dict__.update(module.__dict__)
    dict.update(twin, module)
    return twin
