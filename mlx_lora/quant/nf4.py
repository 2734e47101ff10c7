"""NF4 (QLoRA, arXiv 2305.14314): four bits that spell sixteen numbers, spaced as Gaussian weights are.

    w ≈ s · q[code]     q: the table of Appendix E     s: the largest |w| of a block of 64 weights of a row (§3)

Eight codes to a word of 32 bits, the first in the lowest bits, as MLX packs. With double quantization (§3, eq. 5 and 6)
the scales less their mean are stored in 8 bits: s ≈ mean + c · step, c an int8, and step the 127th part of the largest
distance from the mean among 256 scales that follow each other in the layer. That is 4.127 bits a weight, in place of
4.5. The paper's second level has the 8-bit floats of bitsandbytes; evenly spaced steps need no table.

No backend has a kernel for this: a block of rows is unpacked through a table and multiplied by BLAS or MLX
(`quant.matmul`), in the backward pass again. mlx_lm can't load it. Nothing here evaluates an array.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.quant.dense import dense_weight
from mlx_lora.quant.matmul import multiply_unpacked

MODE, BITS = "nf4", 4
# Appendix E: quantiles of a normal distribution scaled to [-1, 1], with a zero.
CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
MIDPOINTS = tuple((lower + upper) / 2 for lower, upper in pairwise(CODEBOOK))
ZERO = CODEBOOK.index(0.0)
# Scales that share a step, and the largest code of one.
SCALES_PER_BLOCK, LARGEST = 256, 127
# The arrays beside the packed weight, as files name them; the last two with double quantization only.
SCALES = ("scales", "nested_scales", "nested_mean")

# The two float32 numbers of every byte, side by side in one of 64 bits: (1, 256). On a CPU looking them up along an
# axis takes a tenth of the time of indexing a table with codes, and less than unpacking MLX's affine mode.
_PAIRS = mx.array([[CODEBOOK[byte & 15], CODEBOOK[byte >> 4]] for byte in range(256)], mx.float32).view(mx.int64).T


def quantize(weight: mx.array, group_size: int = 64, *, double_quant: bool = False) -> dict[str, mx.array]:
    """A float weight (…, in) as uint32 `weight` (…, in / 8) and `scales` (…, in / group_size), float32.

    With `double_quant` the scales are int8, beside `nested_scales` (blocks of 256,) and `nested_mean` (1,), float32.
    Every weight gets the nearest number of its block, the lower one of two as near; a block of zeros gets zeros.
    """
    groups = weight.astype(mx.float32).reshape(*weight.shape[:-1], -1, group_size)
    scales = mx.abs(groups).max(axis=-1)
    # Thresholds times scales, not weights by scales: a product is rounded alike on every device.
    reach = mx.where(scales == 0, 1.0, scales)[..., None]
    codes = sum(((groups > point * reach).astype(mx.uint8) for point in MIDPOINTS), mx.zeros(groups.shape, mx.uint8))
    codes = codes.reshape(weight.shape)
    packed = mx.contiguous(codes[..., ::2] + 16 * codes[..., 1::2]).view(mx.uint32)
    return {"weight": packed, **(_nested(scales) if double_quant else {"scales": scales})}


def _nested(scales: mx.array) -> dict[str, mx.array]:
    """Double quantization of float32 scales.

    The mean is rounded to bfloat16, so that the order in which a device adds up doesn't show in the codes.
    """
    mean = scales.mean().astype(mx.bfloat16).astype(mx.float32)
    distance = (scales - mean).flatten()
    blocks = mx.pad(distance, (0, -distance.size % SCALES_PER_BLOCK)).reshape(-1, SCALES_PER_BLOCK)
    steps = mx.abs(blocks).max(axis=-1) / LARGEST
    codes = mx.round(blocks / mx.where(steps == 0, 1.0, steps)[:, None]).astype(mx.int8)
    codes = codes.flatten()[: distance.size].reshape(scales.shape)
    return {"scales": codes, "nested_scales": steps, "nested_mean": mean[None]}


def unpack(arrays: Sequence[mx.array], rows: mx.array | slice = slice(None)) -> mx.array:
    """The float32 weights (…, in) behind some rows of a weight's arrays: all of them, a slice, or those of an index.

    `arrays` are the packed weight and what SCALES names, in that order.
    """
    weight = arrays[0][rows]
    scales = _scales(arrays[1:], rows)
    pairs = mx.take_along_axis(_PAIRS, weight.view(mx.uint8).reshape(1, -1), axis=-1)
    values = pairs.view(mx.float32).reshape(*scales.shape, -1)
    return (values * scales[..., None]).reshape(*weight.shape[:-1], -1)


def _scales(arrays: Sequence[mx.array], rows: mx.array | slice) -> mx.array:
    """The float32 scales of some rows. Which step is a scale's follows from its place among all of the layer's."""
    if len(arrays) == 1:
        return arrays[0][rows].astype(mx.float32)
    codes, steps, mean = arrays
    inner = codes.shape[1:]
    size = math.prod(inner)
    if isinstance(rows, slice):
        start, stop, _ = rows.indices(codes.shape[0])
        places = mx.arange(start * size, stop * size).reshape(-1, *inner)
    else:
        first = (rows.astype(mx.int32) * size).reshape(*rows.shape, *(1 for _ in inner))
        places = first + mx.arange(size).reshape(inner)
    return codes[rows].astype(mx.float32) * steps[places // SCALES_PER_BLOCK] + mean


class _Packed:
    """What the three layers share: their arrays, and `mode`, `bits` and `group_size` as MLX's packed layers have."""

    mode, bits = MODE, BITS

    def _hold(self: Any, layer: nn.Module, group_size: int, double_quant: bool) -> None:
        nn.Module.__init__(self)
        self.group_size, self.double_quant = group_size, double_quant
        arrays = quantize(layer["weight"], group_size, double_quant=double_quant)
        for name, array in arrays.items():
            self[name] = array
        if "bias" in layer:
            self.bias = layer["bias"]
        self.freeze()

    def arrays(self: Any) -> list[mx.array]:
        """The packed weight and its scales, as `unpack` takes them."""
        return [self[name] for name in ("weight", *SCALES) if name in self]

    def multiply(self: Any, x: mx.array) -> mx.array:
        """x (…, in) times the transposed weight, (…, out) in x's dtype; by its dense copy where there is one."""
        weight = dense_weight(self)
        return multiply_unpacked(x, self.arrays(), unpack) if weight is None else x @ weight.T


class NF4Linear(_Packed, nn.QuantizedLinear):
    """A Linear in NF4: x (…, in) -> (…, out) in x's dtype."""

    def __init__(self, layer: nn.Module, group_size: int = 64, double_quant: bool = False):
        self._hold(layer, group_size, double_quant)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.multiply(x)
        return y + self["bias"] if "bias" in self else y


class NF4Embedding(_Packed, nn.QuantizedEmbedding):
    """An Embedding in NF4: tokens -> (…, dim) in `dtype`, the plain one's unless `compute_in` says another."""

    def __init__(self, layer: nn.Module, group_size: int = 64, double_quant: bool = False):
        self._hold(layer, group_size, double_quant)
        self.num_embeddings, self.dims = layer["weight"].shape
        self.dtype = layer["weight"].dtype

    def __call__(self, x: mx.array) -> mx.array:
        return unpack(self.arrays(), x).astype(self.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        return self.multiply(x)


class NF4SwitchLinear(_Packed, nn.Module):
    """A SwitchLinear in NF4: weight (experts, out, in), a product with the experts that `indices` choose.

    While one projection is computed its experts are dense: all of them, or only the chosen ones where that is fewer.
    """

    def __init__(self, layer: nn.Module, group_size: int = 64, double_quant: bool = False):
        self._hold(layer, group_size, double_quant)

    @property
    def input_dims(self) -> int:
        return int(self["weight"].shape[2] * 32 // BITS)

    @property
    def output_dims(self) -> int:
        return int(self["weight"].shape[1])

    @property
    def num_experts(self) -> int:
        return int(self["weight"].shape[0])

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = _experts_multiply(sorted_indices)(x, indices, *self.arrays())
        return y + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else y


@lru_cache
def _experts_multiply(sorted_indices: bool) -> Callable[..., mx.array]:
    """`mx.gather_mm` with experts that are unpacked in the forward pass and again in the backward pass."""

    def product(x: mx.array, indices: mx.array, arrays: Sequence[mx.array], after: mx.array) -> mx.array:
        arrays = mx.depends(list(arrays), [after])
        few = indices.size < arrays[0].shape[0]
        weight = unpack(arrays, indices.flatten()) if few else unpack(arrays)
        chosen = mx.arange(indices.size, dtype=mx.uint32).reshape(indices.shape) if few else indices
        weight = weight.astype(x.dtype).swapaxes(-1, -2)
        return mx.gather_mm(x, weight, rhs_indices=chosen, sorted_indices=sorted_indices)

    @mx.custom_function  # type: ignore[untyped-decorator]
    def multiply(x: mx.array, indices: mx.array, *arrays: mx.array) -> mx.array:
        return product(x, indices, arrays, x)

    @multiply.vjp  # type: ignore[untyped-decorator]
    def multiply_vjp(primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        x, indices, *arrays = primals
        _, (gradient,) = mx.vjp(lambda x: product(x, indices, arrays, cotangent), [x], [cotangent])
        frozen = tuple(mx.broadcast_to(mx.zeros((), array.dtype), array.shape) for array in (indices, *arrays))
        return (gradient, *frozen)

    return multiply  # type: ignore[return-value, no-any-return]


def class_for(layer: nn.Module) -> Callable[..., nn.Module] | None:
    """What packs `layer`, or None for one that isn't served: a subclass may multiply in another way.

    mlx_lm's SwitchLinear is told by its name: this room is left of the one that imports mlx_lm.
    """
    if type(layer) in (nn.Linear, nn.Embedding):
        return NF4Linear if type(layer) is nn.Linear else NF4Embedding
    return NF4SwitchLinear if type(layer).__name__ == "SwitchLinear" else None


def is_nf4(layer: nn.Module) -> bool:
    """Whether `layer` is one of the three above."""
    return isinstance(layer, _Packed)


def compute_in(model: nn.Module, dtype: mx.Dtype) -> None:
    """Let every NF4 embedding of `model` give `dtype`: nothing that is stored says what activations are."""
    for module in model.modules():
        if isinstance(module, NF4Embedding):
            module.dtype = dtype
