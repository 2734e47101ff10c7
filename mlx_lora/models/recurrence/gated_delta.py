"""The gated delta rule (2412.06464) in chunks, with one decay a head or, as in Kimi Linear (2510.26692), one a channel.

For each position, with the state S (Dv, Dk):  S ← S Diag(α);  δ = β (v - S k);  S ← S + δ kᵀ;  y = S q.

For a chunk of C positions, S₀ is the state before it, Λᵢ = Σ_{m≤i} log α_m, Mᵢⱼ = Σ_c q_ic k_jc e^{Λ_ic - Λ_jc} for
j ≤ i, and Aᵢⱼ = βᵢ Σ_c k_ic k_jc e^{Λ_ic - Λ_jc} for j < i. Then:

    T = (I + A)⁻¹ Diag(β)     Δ = T V - T (K ∘ e^Λ) S₀ᵀ
    Y = (Q ∘ e^Λ) S₀ᵀ + M Δ   S ← S₀ Diag(e^{Λ_C}) + Δᵀ (K ∘ e^{Λ_C - Λ})

Only Δ, Y and S need the state; the rest is computed for all chunks of a span at once. With packed rows, M and A are 0
for positions of different rows, e^Λ is 0 for positions outside the row that S₀ belongs to, and only the row of the
chunk's last position contributes to S.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.machine import allocation
from mlx_lora.models.recurrence import channels, chunks
from mlx_lora.models.recurrence.resets import current_segments
from mlx_lora.models.recurrence.scan import Arrays, Marks, Step, scan
from mlx_lora.models.recurrence.triangular import unit_lower_inverse

with allocation.file_limits_kept():
    from mlx_lm.models import gated_delta as theirs


def gated_delta_update(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    use_kernel: bool = True,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    segments: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """mlx_lm's function of this name: y (B, T, Hv, Dv) in q's dtype and the state (B, Hv, Dv, Dk) in float32.

    q, k (B, T, Hk, Dk), normalised; v (B, T, Hv, Dv); b (B, T, Hv); a (B, T, Hv), or (B, T, Hv, Dk) for a decay of
    each channel. log α = -e^{A_log} softplus(a + dt_bias), or lower_bound · sigmoid(e^{A_log} (a + dt_bias)); β =
    sigmoid(b), twice that with `allow_neg_eigval`. `mask` (B, T) bool: where it is False, the state doesn't change and
    y is meaningless. `segments`: see `resetting`; `state` belongs to the first position's segment. A single position
    isn't worth a chunk, so it goes to mlx_lm's own function; only that one uses `use_kernel`.
    """
    segments = current_segments() if segments is None else segments
    lines, length, keys, width = q.shape
    heads, depth = v.shape[-2:]
    if length == 1:
        options = {"use_kernel": use_kernel, "lower_bound": lower_bound, "allow_neg_eigval": allow_neg_eigval}
        return theirs.gated_delta_update(q, k, v, a, b, A_log, dt_bias, state, mask, **options)  # type: ignore[no-any-return]
    if state is None:
        state = mx.zeros((lines, heads, depth, width), dtype=mx.float32)
    return scan(
        _step(lower_bound, allow_neg_eigval),
        state.astype(mx.float32),
        (q, k, v, a, b),
        (A_log, dt_bias),
        chunks.marks(segments, mask),
        span=chunks.span_length(lines * heads * _held_bytes(width, depth, by_channel=a.ndim == 4)),
    )


def _held_bytes(width: int, depth: int, *, by_channel: bool) -> int:
    """Bytes that a chunk of one head holds in the backward pass, as measured."""
    size = chunks.longest()
    return 4 * (size * ((15 if by_channel else 7) * width + 6 * depth + 7 * size) + 3 * width * depth)


@lru_cache
def _step(lower_bound: float | None, allow_neg_eigval: bool) -> Step:
    """The function of one span for these gates."""

    def step(state: mx.array, sequences: Arrays, constants: Arrays, marks: Marks) -> tuple[mx.array, mx.array]:
        q, k, v, a, b = sequences
        segments, segments_before, mask = marks
        A_log, dt_bias = constants
        logarithms, beta = gates(a, b, A_log, dt_bias, lower_bound, allow_neg_eigval, mask)
        length, keys = q.shape[1:3]
        size = chunks.chunk_length(length)
        packed = chunks.borders(segments, segments_before, size)
        initial = state.reshape(state.shape[0], keys, -1, *state.shape[2:])
        y, final = _chunks(initial, packed, *(chunks.cut(x, keys, size) for x in (q, k, v, logarithms, beta)))
        return chunks.uncut(y, length).astype(q.dtype), final.reshape(state.shape)

    return step


def gates(
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    lower_bound: float | None,
    allow_neg_eigval: bool,
    mask: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """(log α float32, β) of every position, both 0 where the mask is False; computed in mlx_lm's order and dtypes."""
    rate = mx.exp(A_log.astype(mx.float32))
    if lower_bound is None:
        logarithms = -rate * nn.softplus(a + dt_bias)
    else:
        logarithms = lower_bound * mx.sigmoid(rate * (a.astype(mx.float32) + dt_bias))
    beta = mx.sigmoid(b)
    if allow_neg_eigval:
        beta = beta * 2.0
    if mask is not None:
        beta = mx.where(mask[..., None], beta, 0)
        logarithms = mx.where(mask.reshape(*mask.shape, *[1] * (a.ndim - 2)), logarithms, 0)
    return logarithms, beta


def _chunks(
    state: mx.array,
    packed: chunks.Borders | None,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    logarithms: mx.array,
    beta: mx.array,
) -> tuple[mx.array, mx.array]:
    """y (B, n, Hk, G, C, Dv) and the state (B, Hk, G, Dv, Dk) after n chunks, in float32."""
    one_decay_a_head = logarithms.ndim == beta.ndim
    decay = chunks.decays(mx.exp(logarithms[..., None] if one_decay_a_head else logarithms), packed)
    if one_decay_a_head:
        transposed, within = k.swapaxes(-1, -2), chunks.within(decay, packed)
        query_products, key_products = (q @ transposed) * within, (k @ transposed) * within
    else:
        query_products, key_products = channels.products(q, k, decay, packed)
    inverse = unit_lower_inverse(beta[..., None] * key_products) * beta[..., None, :]
    entering, leaving = decay.entering, decay.leaving
    values, keys = inverse @ v, inverse @ (k * entering)
    return _serial(state, values, keys, q * entering, k * leaving, query_products, decay.total)


def _serial(state: mx.array, *factors: mx.array) -> tuple[mx.array, mx.array]:
    """The loop over chunks: `factors` are T V, T (K e^Λ), Q e^Λ, K e^{Λ_C - Λ}, M and e^{Λ_C}, each (B, n, …)."""
    outputs = []
    for values, keys, q, k, products, total in zip(*(chunks.unstacked(x, axis=1) for x in factors), strict=True):
        transposed = state.swapaxes(-1, -2)
        delta = values - keys @ transposed
        outputs.append(q @ transposed + products @ delta)
        state = state * total + delta.swapaxes(-1, -2) @ k
    return mx.stack(outputs, axis=1), state
