"""The inverse of a unit lower triangular matrix in plain operations; MLX's has no gradient and doesn't run on a GPU."""

from __future__ import annotations

import mlx.core as mx


@mx.custom_function  # type: ignore[untyped-decorator]
def unit_lower_inverse(a: mx.array) -> mx.array:
    """(I + A)⁻¹, (…, C, C), where A is the part of `a` (…, C, C) strictly below the diagonal; C is a power of 2.

    Forward substitution by blocks. Starting with blocks of one row, each step joins all pairs of neighbouring blocks:
    [[P, 0], [A₂₁, Q]]⁻¹ = [[P⁻¹, 0], [-Q⁻¹ A₂₁ P⁻¹, Q⁻¹]]. The product (I - A)(I + A²)(I + A⁴)… needs fewer steps, but
    its powers explode for equal keys without decay, as repeated text has them: an error of 1e4 for C = 32.
    """
    blocks = mx.ones((*a.shape[:-1], 1, 1))
    while (size := blocks.shape[-1]) < a.shape[-1]:
        upper, lower = blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]
        left = _left_blocks(a, size)
        blocks = joined(upper, -left if size == 1 else -(lower @ left @ upper), lower)
    return blocks[..., 0, :, :]


@unit_lower_inverse.vjp  # type: ignore[untyped-decorator]
def _unit_lower_inverse_vjp(a: mx.array, cotangent: mx.array, inverse: mx.array) -> mx.array:
    """-strictly_lower(Tᵀ dT Tᵀ), from dT = -T dA T."""
    transposed = inverse.swapaxes(-1, -2)
    return -mx.tril(transposed @ cotangent @ transposed, -1)


def _left_blocks(a: mx.array, size: int) -> mx.array:
    """The blocks A₂₁ of all pairs of diagonal blocks of `size` in (…, C, C): (…, C / (2·size), size, size)."""
    width = a.shape[-1]
    shape = (a.size // width**2, width // (2 * size), size, size)
    strides = (width**2, 2 * size * (width + 1), width, 1)
    return mx.as_strided(a, shape, strides, size * width).reshape(*a.shape[:-2], *shape[1:])


def joined(upper: mx.array, left: mx.array, lower: mx.array) -> mx.array:
    """[[upper, 0], [left, lower]] of blocks (…, n, n)."""
    top = mx.pad(upper, [(0, 0)] * (upper.ndim - 1) + [(0, upper.shape[-1])])
    return mx.concatenate([top, mx.concatenate([left, lower], axis=-1)], axis=-2)
