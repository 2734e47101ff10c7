"""The inverse of a unit lower triangular matrix in plain operations; MLX's own has no gradient and no GPU."""

from __future__ import annotations

import mlx.core as mx

# Rows inverted one after another. Doubling products of (I - A)(I + A²)… take fewer steps, but equal keys without decay,
# which repeated text makes, let them explode: an error of 1e-4 at 16 rows, 1e4 at 32.
ROWS = 16


@mx.custom_function  # type: ignore[untyped-decorator]
def unit_lower_inverse(a: mx.array) -> mx.array:
    """(I + A)⁻¹ for A, what is strictly below the diagonal of `a` (…, C, C); C is 16, 32, 64, …

    Blocks of 16 rows by forward substitution, all blocks at once; then two neighbours are joined at a time:
    [[P, 0], [A₂₁, Q]]⁻¹ = [[P⁻¹, 0], [-Q⁻¹ A₂₁ P⁻¹, Q⁻¹]].
    """
    size = ROWS
    blocks = _substituted(below(a, size, diagonal=True))
    while size < a.shape[-1]:
        upper, lower = blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]
        blocks = joined(upper, -(lower @ below(a, size) @ upper), lower)
        size *= 2
    return blocks[..., 0, :, :]


@unit_lower_inverse.vjp  # type: ignore[untyped-decorator]
def _unit_lower_inverse_vjp(a: mx.array, cotangent: mx.array, inverse: mx.array) -> mx.array:
    """-strictly_lower(Tᵀ dT Tᵀ), from dT = -T dA T."""
    turned = inverse.swapaxes(-1, -2)
    return -mx.tril(turned @ cotangent @ turned, -1)


def below(a: mx.array, size: int, *, diagonal: bool = False) -> mx.array:
    """Blocks of (…, C, C) on the diagonal, (…, C/size, size, size), or those left of every second one of them."""
    columns = range(0, a.shape[-1], size if diagonal else 2 * size)
    down = 0 if diagonal else size
    return mx.stack([a[..., at + down : at + down + size, at : at + size] for at in columns], axis=-3)


def joined(upper: mx.array, left: mx.array, lower: mx.array) -> mx.array:
    """[[upper, 0], [left, lower]] of blocks (…, n, n)."""
    above = mx.concatenate([upper, mx.zeros_like(upper)], axis=-1)
    return mx.concatenate([above, mx.concatenate([left, lower], axis=-1)], axis=-2)


def _substituted(a: mx.array) -> mx.array:
    """Row i of the inverse is eᵢ - Σ_{j<i} aᵢⱼ row j. Blocks (…, n, n), moved last for operations on long vectors."""
    size = a.shape[-1]
    columns = mx.contiguous(a.reshape(-1, size, size).transpose(1, 2, 0))
    identity = mx.eye(size)[:, :, None]
    found = mx.broadcast_to(identity[:1], (1, size, columns.shape[-1]))
    for row in range(1, size):
        known = (columns[row, :row, None] * found).sum(axis=0, keepdims=True)
        found = mx.concatenate([found, identity[row : row + 1] - known], axis=0)
    return found.transpose(2, 0, 1).reshape(a.shape)
