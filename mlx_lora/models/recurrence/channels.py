"""Products of keys and queries in which every channel decays by itself, as Kimi Linear's (2510.26692).

Σ_c q_ic k_jc e^{Λ_ic - Λ_jc} is a matrix product where a position between j and i splits the decay into two factors
that are both at most 1. So a chunk is halved again and again: queries of the second half meet keys of the first, with
the border as that position. The small blocks that are left hold a decay for each pair and channel.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_lora.models.recurrence.chunks import Borders
from mlx_lora.models.recurrence.triangular import joined

# Positions of a block whose pairs are computed one by one; more would cost more than the small products saved.
PAIRS = 4


def products(q: mx.array, k: mx.array, logarithms: mx.array, packed: Borders | None) -> tuple[mx.array, mx.array]:
    """(M, A without β) of `gated_delta`, (…, C, C), from q, k (…, 1, C, Dk) and log α (…, G, C, Dk).

    0 above the diagonal and between rows; the keys' diagonal has no meaning.
    """
    both = mx.stack([q, k])
    blocks = _pairs(both, logarithms)
    size = PAIRS
    while size < q.shape[-2]:
        left = _halves(both, logarithms, size)
        blocks = joined(blocks[..., 0::2, :, :], left, blocks[..., 1::2, :, :])
        size *= 2
    blocks = blocks[..., 0, :, :]
    reads, keys = blocks if packed is None else mx.where(packed.same, blocks, 0.0)
    return reads, keys


def _halves(both: mx.array, logarithms: mx.array, size: int) -> mx.array:
    """Second halves with first ones of all blocks of 2·size positions: (2, …, blocks, size, size)."""
    first, second = (x[..., 0, :, :] for x in mx.split(_blocks(logarithms, size), 2, axis=-3))
    early, late = (x[..., 0, :, :] for x in mx.split(_blocks(both, size), 2, axis=-3))
    rows = late * mx.exp(mx.cumsum(second, axis=-2))
    columns = early[1] * mx.exp(mx.cumsum(first, axis=-2, reverse=True, inclusive=False))
    return rows @ columns.swapaxes(-1, -2)


def _pairs(both: mx.array, logarithms: mx.array) -> mx.array:
    """Blocks of PAIRS positions on the diagonal, pair by pair: (2, …, blocks, PAIRS, PAIRS)."""
    found = logarithms.reshape(*logarithms.shape[:-2], -1, PAIRS, logarithms.shape[-1])
    rows = both.reshape(*both.shape[:-2], -1, PAIRS, both.shape[-1])
    later = mx.tri(PAIRS, k=-1, dtype=mx.bool_)[:, :, None]  # type: ignore[arg-type]
    sums = mx.cumsum(mx.where(later, found[..., None, :], 0.0), axis=-3)
    decay = mx.exp(mx.where(mx.tri(PAIRS, dtype=mx.bool_)[:, :, None], sums, -mx.inf))  # type: ignore[arg-type]
    weighted = rows[1][..., None, :, :] * decay
    return (rows[..., :, None, :] * weighted).sum(axis=-1)


def _blocks(x: mx.array, size: int) -> mx.array:
    """(…, C, D) as (…, blocks, 2, size, D)."""
    return x.reshape(*x.shape[:-2], -1, 2, size, x.shape[-1])
