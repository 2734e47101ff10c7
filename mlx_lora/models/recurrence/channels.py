"""Products of keys and queries in which every channel decays by itself, as Kimi Linear's (2510.26692).

Σ_c q_ic k_jc e^{Λ_ic - Λ_jc} is a matrix product where a position between j and i splits the decay into two factors
that are both at most 1. So a chunk is halved down to single positions: queries of a second half meet keys of the first,
with the middle as that position.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_lora.models.recurrence.chunks import Borders, Decays, halved
from mlx_lora.models.recurrence.triangular import joined


def products(q: mx.array, k: mx.array, decay: Decays, packed: Borders | None) -> tuple[mx.array, mx.array]:
    """(M, A without β) of `gated_delta`, (…, C, C), from q, k (…, 1, C, Dk) and decays of (…, G, C, Dk).

    0 above the diagonal and between rows; the diagonal of A has no meaning.
    """
    both = mx.stack([q, k])
    shape = (2, *decay.entering.shape[:-1], 1, 1)
    blocks = mx.broadcast_to((both * k).sum(axis=-1)[..., None, None], shape)
    for entering, leaving in decay.halves:
        size = entering.shape[-2]
        early, late = halved(both.reshape(*both.shape[:-2], -1, size, both.shape[-1]))
        left = (late * entering) @ (early[1] * leaving).swapaxes(-1, -2)
        upper, lower = halved(blocks)
        blocks = joined(upper, left, lower)
    blocks = blocks[..., 0, :, :]
    reads, keys = blocks if packed is None else mx.where(packed.same, blocks, 0.0)
    return reads, keys
