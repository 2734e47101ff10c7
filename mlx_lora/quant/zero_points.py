"""Zero-points of an affine base with an update added, rounded to the dtype that they are stored in.

A zero-point in half precision holds about three digits, and the update of a short training is often smaller than the
distance to the next one. Rounding each to the nearest would then keep all of them as they were. So each element rounds
at a threshold t of its own in [0, 1): where the sum lies the fraction f of the way between two numbers of the dtype,
it becomes the one farther from zero if f + t ≥ 1, else the nearer one. The thresholds are spread evenly along rows and
columns (the additive sequence R2 of the plastic number), so the share of elements that move is f: on the mean over
some elements the update is there, whatever its size. This is dithering as in images, with fixed thresholds. The same
arrays always give the same bits. An update of zero changes nothing.
"""

from __future__ import annotations

import mlx.core as mx

# Of a float32's 23 bits of mantissa, those that the dtype doesn't have.
LOST_BITS = {mx.float16: 13, mx.bfloat16: 16}
# Steps of t · 2³² along columns, rows and experts: 2³² / ρ and 2³² / ρ² with ρ = 1.3247…, the plastic number, and
# 2³² / 1.618…
STEPS = (0xC13FA9A9, 0x91E10DA5, 0x9E3779B9)


def rounds(zero_points: mx.array) -> bool:
    """Whether zero-points of this dtype hold less than a float32 does."""
    return zero_points.dtype in LOST_BITS


def added(zero_points: mx.array, update: mx.array) -> mx.array:
    """zero_points + update (…, out, groups), in the zero-points' dtype; `update` is float32.

    Float32 zero-points hold the sum as it is.
    """
    total = zero_points.astype(mx.float32) + update
    lost = LOST_BITS.get(zero_points.dtype)
    if lost is None:
        return total.astype(zero_points.dtype)
    bits = mx.view(total, mx.uint32) + (_thresholds(zero_points.shape) >> (32 - lost))
    return mx.view(bits & (0xFFFFFFFF << lost & 0xFFFFFFFF), mx.float32).astype(zero_points.dtype)


def difference(merged: mx.array, zero_points: mx.array) -> mx.array:
    """merged − zero_points, float32: exact, both being numbers of one dtype in half precision."""
    return merged.astype(mx.float32) - zero_points.astype(mx.float32)


def _thresholds(shape: tuple[int, ...]) -> mx.array:
    """t · 2³² of each element, uint32."""
    total = mx.array(1 << 31, mx.uint32)
    for axis, (length, step) in enumerate(zip(reversed(shape), STEPS, strict=False)):
        total = total + (mx.arange(length, dtype=mx.uint32) * step).reshape(-1, *[1] * axis)
    return total
