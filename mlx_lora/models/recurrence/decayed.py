"""Attention without softmax, with one decay a head: the shared part of Mamba-2 (2405.21060) and Lightning (2401.04658).

For each position, with the state S (Dv, Dk):  S ← e^{g} S + v kᵀ;  y = S q. In a chunk, Λᵢ = Σ_{m≤i} g_m:

    Y = ((Q Kᵀ) ∘ e^{Λᵢ - Λⱼ}) V + e^Λ (Q S₀ᵀ)     S ← e^{Λ_C} S₀ + (e^{Λ_C - Λ} V)ᵀ K
"""

from __future__ import annotations

import mlx.core as mx

from mlx_lora.models.recurrence import chunks
from mlx_lora.models.recurrence.scan import Marks


def decayed_attention(
    state: mx.array, q: mx.array, k: mx.array, v: mx.array, logarithms: mx.array, marks: Marks
) -> tuple[mx.array, mx.array]:
    """y (B, T, H, Dv) and the state (B, H, Dv, Dk) after one span, in float32.

    q, k (B, T, G, Dk), each shared by H / G consecutive heads; v (B, T, H, Dv); logarithms (B, T, H).
    `marks` begin with the segments of the positions and of the positions before them, or two Nones.
    """
    length, groups = q.shape[1:3]
    size = chunks.chunk_length(length)
    packed = chunks.borders(marks[0], marks[1], size)
    q, k, v, logarithms = (chunks.cut(x, groups, size) for x in (q, k, v, logarithms))
    decay = chunks.decays(mx.exp(logarithms[..., None]), packed)
    within_chunk = ((q @ k.swapaxes(-1, -2)) * chunks.within(decay, packed)) @ v
    updates = (v * decay.leaving).swapaxes(-1, -2) @ k
    current = state.reshape(state.shape[0], groups, -1, *state.shape[2:])
    states = []  # before each chunk
    for total, update in zip(chunks.unstacked(decay.total, axis=1), chunks.unstacked(updates, axis=1), strict=True):
        states.append(current)
        current = current * total + update
    y = within_chunk + decay.entering * (q @ mx.stack(states, axis=1).swapaxes(-1, -2))
    return chunks.uncut(y, length), current.reshape(state.shape)


def held_bytes(lines: int, heads: int, depth: int, width: int) -> int:
    """Bytes that a chunk of `chunks.longest` positions holds in the backward pass."""
    size = chunks.longest()
    return 4 * lines * heads * (size * (6 * depth + 4 * width + 6 * size) + 4 * depth * width)
