"""Weights that were packed once before, and whether another packing can hold them without a second loss.

A model that came from 4 or 8 bits (a GGUF file, mostly) has in each group of 32 weights no more than 2^bits values, at
equal distances:

    w = bias + scale · q     q: 0 … 2^bits − 1

Packed onto another grid (groups of 64, another scale) every weight is rounded a second time, and the result is far
worse than the same packing of weights that were never packed. On their own grid nothing is lost but the rounding of
their half precision. K-quants count too: their blocks of 32 are such grids.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

GROUP = 32
# How far a value in half precision may lie from the grid, as a part of the largest of its group. The value, and the
# smallest and the largest, which the grid is made from, are each rounded by up to 2^-11 (bfloat16: 2^-8) of it.
ROUNDING = {mx.float16: 2**-9, mx.bfloat16: 2**-6}
SMALLEST = 2**-24
# Distances between the smallest and the largest value of a group of 4 bits, in steps; a group that was packed well
# uses most of its 16 values. With 8 bits only grids around zero are looked for, as Q8_0 has them.
STEPS = range(15, 7, -1)
LARGEST_OF_8 = 127
# Elements that are looked at together: their float32 copies stay small beside a layer.
BLOCK = 1 << 22


def grid_of(sample: mx.array, bits: int) -> dict[str, Any] | None:
    """Affine settings of at most `bits` bits that hold rows of a weight (rows, columns) exactly, or None.

    Exactly is within the rounding of the sample's own half precision. A weight in float32 was never rounded to half,
    and is packed like any other.
    """
    rounding = ROUNDING.get(sample.dtype)
    if rounding is None or sample.shape[-1] % GROUP:
        return None
    groups = sample.astype(mx.float32).reshape(-1, GROUP)
    if not bool((groups != 0).any().item()):
        return None
    allowed = mx.maximum(mx.abs(groups).max(axis=-1) * rounding, SMALLEST)
    possible = (4, 8) if sample.dtype == mx.float16 else (4,)  # bfloat16 is coarser than 8 bits
    for own in (its for its in possible if its <= bits):
        scale, bias, codes = _fitted(groups, own)
        away = mx.abs(scale[:, None] * codes + bias[:, None] - groups).max(axis=-1)
        if bool((away <= allowed).all().item()):
            return {"mode": "affine", "bits": own, "group_size": GROUP}
    return None


def pack_on_grid(weight: mx.array, bits: int) -> tuple[mx.array, mx.array, mx.array]:
    """A weight (…, in) as MLX's packed uint32 weight, scales and biases (…, in / 32) in its own dtype; lazily."""
    rows = weight.reshape(-1, weight.shape[-1])
    step = max(BLOCK // rows.shape[-1], 1)
    parts: list[list[mx.array]] = []
    for start in range(0, rows.shape[0], step):
        (block,) = mx.depends([rows[start : start + step]], parts[-1] if parts else [])  # one block after the other
        scale, bias, codes = _fitted(block.astype(mx.float32).reshape(-1, GROUP), bits)
        per_word = 32 // bits
        words = codes.astype(mx.uint32).reshape(block.shape[0], -1, per_word)
        shifted = mx.left_shift(words, mx.arange(0, 32, bits, dtype=mx.uint32)).sum(axis=-1)
        shape = (block.shape[0], -1)
        parts.append([shifted, *(values.reshape(shape).astype(weight.dtype) for values in (scale, bias))])
    arrays = (mx.concatenate(list(blocks)) for blocks in zip(*parts, strict=True))
    packed, scales, biases = (array.reshape(*weight.shape[:-1], -1) for array in arrays)
    return packed.astype(mx.uint32), scales, biases


def _fitted(groups: mx.array, bits: int) -> tuple[mx.array, mx.array, mx.array]:
    """(scales (N,), biases (N,), codes (N, 32)) of float32 groups (N, 32), on the grid that is nearest to each."""
    if bits == 8:
        scale = mx.abs(groups).max(axis=-1) / LARGEST_OF_8
        bias = -128 * scale
        return scale, bias, mx.round(groups / _not_zero(scale)[:, None]) + 128
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    best = _on_grid(groups, low, (high - low) / STEPS[0])
    for steps in STEPS[1:]:
        other = _on_grid(groups, low, (high - low) / steps)
        nearer = other[0] < 0.5 * best[0]  # another grid has to be clearly better: several hold equal values
        best = tuple(mx.where(nearer.reshape(-1, *[1] * (a.ndim - 1)), b, a) for a, b in zip(best, other, strict=True))
    return best[1], low, best[2]


def _on_grid(groups: mx.array, low: mx.array, scale: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """(largest distance (N,), scales (N,), codes (N, 32)) on grids that begin at `low`."""
    codes = mx.round((groups - low[:, None]) / _not_zero(scale)[:, None])
    away = mx.abs(scale[:, None] * codes + low[:, None] - groups).max(axis=-1)
    return away, scale, codes


def _not_zero(scale: mx.array) -> mx.array:
    return mx.where(scale == 0, 1.0, scale)
