"""Products of keys and queries in which every channel has its own decay, as in Kimi Linear (2510.26692).

The product is Σ_c q_ic k_jc e^{Λ_ic - Λ_jc}. For a position m between j and i, the decay splits into the factors
e^{Λ_i - Λ_m} and e^{Λ_m - Λ_j}, both at most 1, and the sum becomes a matrix product. So a chunk is halved again and
again down to single positions. At each level, queries of every second half meet keys of the first half, with m in the
middle.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_lora.models.recurrence.chunks import Borders, Decays, halved
from mlx_lora.models.recurrence.triangular import joined


def products(q: mx.array, k: mx.array, decay: Decays, packed: Borders | None) -> tuple[mx.array, mx.array]:
    """(M, A without β) of `gated_delta`, (…, C, C), from q, k (…, 1, C, Dk) and decays of (…, G, C, Dk).

    0 above the diagonal and between rows; the diagonal of A is meaningless.
    """
    queries_and_keys = mx.stack([q, k])
    shape = (2, *decay.entering.shape[:-1], 1, 1)
    blocks = mx.broadcast_to((queries_and_keys * k).sum(axis=-1)[..., None, None], shape)
    for entering, leaving in decay.halves:
        size = entering.shape[-2]
        first, second = halved(queries_and_keys.reshape(*queries_and_keys.shape[:-2], -1, size, k.shape[-1]))
        left = (second * entering) @ (first[1] * leaving).swapaxes(-1, -2)
        upper, lower = halved(blocks)
        blocks = joined(upper, left, lower)
    blocks = blocks[..., 0, :, :]
    query_products, key_products = blocks if packed is None else mx.where(packed.same, blocks, 0.0)
    return query_products, key_products
