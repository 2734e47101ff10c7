"""Products of keys and queries in which every channel decays by itself, as Kimi Linear's (2510.26692).

Σ_c q_ic k_jc e^{Λ_ic - Λ_jc} is a matrix product where a position between j and i splits the decay into two factors
that are both at most 1. So a chunk is halved again and again: queries of the second half meet keys of the first, with
the border as that position. The small blocks that are left hold a decay for each pair and channel.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_lora.models.recurrence.chunks import PAIRS, Borders, halved, halves, pairs
from mlx_lora.models.recurrence.triangular import joined


def products(q: mx.array, k: mx.array, logarithms: mx.array, packed: Borders | None) -> tuple[mx.array, mx.array]:
    """(M, A without β) of `gated_delta`, (…, C, C), from q, k (…, 1, C, Dk) and log α (…, G, C, Dk).

    0 above the diagonal and between rows; the keys' diagonal has no meaning.
    """
    both = mx.stack([q, k])
    blocks = _pairs(both, logarithms)
    size = PAIRS
    while size < q.shape[-2]:
        early, late = halved(both, size)
        entering, leaving = halves(logarithms, size)
        left = (late * entering) @ (early[1] * leaving).swapaxes(-1, -2)
        blocks = joined(blocks[..., 0::2, :, :], left, blocks[..., 1::2, :, :])
        size *= 2
    blocks = blocks[..., 0, :, :]
    reads, keys = blocks if packed is None else mx.where(packed.same, blocks, 0.0)
    return reads, keys


def _pairs(both: mx.array, logarithms: mx.array) -> mx.array:
    """Blocks of PAIRS positions on the diagonal, pair by pair: (2, …, blocks, PAIRS, PAIRS)."""
    rows = both.reshape(*both.shape[:-2], -1, PAIRS, 1, both.shape[-1])
    keys = rows[1].swapaxes(-2, -3) * pairs(logarithms)
    return (rows * keys).sum(axis=-1)
