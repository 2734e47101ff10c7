"""Lightning attention (2401.04658) in chunks: each head's state decays by a constant.

h (K, V) of a head:  h ← e^{g} h + kᵀ v;  y = scale · q h.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_lora.machine import allocation
from mlx_lora.models.recurrence import chunks, decayed
from mlx_lora.models.recurrence.resets import current_segments
from mlx_lora.models.recurrence.scan import Arrays, Marks, scan

with allocation.file_limits_kept():
    from mlx_lm.models import bailing_hybrid as theirs


def recurrent_gla(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    scale: float,
    h: mx.array | None = None,
    mask: mx.array | None = None,
    chunk: int = 128,
    *,
    segments: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """bailing_hybrid's and bailing_moe_linear's function: y (B, H, T, V) in q's dtype, the state (B, H, K, V) float32.

    q, k (B, H, T, K), v (B, H, T, V), g (H,), at most 0. `mask` (B, T) bool: where it is False, the state doesn't
    change and y is meaningless. `segments`: see `resetting`; `h` belongs to the first position's segment. `chunk` is
    ignored; it exists for the same signature. In half precision this is more exact than bailing_moe_linear's function,
    which rounds e^g. A single position goes to bailing_hybrid's function.
    """
    lines, heads, length, width = q.shape
    depth = v.shape[-1]
    if length == 1:
        y, h = theirs.recurrent_gla(q, k, v, g, scale=scale, h=h, mask=mask)
        return y.astype(q.dtype), h
    segments = current_segments() if segments is None else segments
    if h is None:
        h = mx.zeros((lines, heads, width, depth), dtype=mx.float32)
    y, state = scan(
        _step,
        h.astype(mx.float32).swapaxes(-1, -2),
        tuple(x.swapaxes(1, 2) for x in (q * scale, k, v)),
        (g,),
        chunks.marks(segments, mask),
        span=chunks.span_length(decayed.held_bytes(lines, heads, depth, width)),
    )
    return y.swapaxes(1, 2), state.swapaxes(-1, -2)


def _step(state: mx.array, sequences: Arrays, constants: Arrays, marks: Marks) -> tuple[mx.array, mx.array]:
    """Compute one span."""
    q, k, v = sequences
    mask = marks[2]
    logarithms = mx.broadcast_to(constants[0].astype(mx.float32), q.shape[:3])
    if mask is not None:
        k = mx.where(mask[..., None, None], k, 0)
        logarithms = mx.where(mask[..., None], logarithms, 0)
    y, state = decayed.decayed_attention(state, q, k, v, logarithms, marks)
    return y.astype(q.dtype), state
