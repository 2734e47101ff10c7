"""Mamba-2's recurrence (state-space duality, 2405.21060) in chunks.

S (P, N) of a head:  Δ = clip(softplus(dt + bias));  S ← e^{-e^{A_log} Δ} S + Δ x Bᵀ;  y = S C + D x.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.machine import allocation
from mlx_lora.models.recurrence import chunks, decayed
from mlx_lora.models.recurrence.resets import current_segments
from mlx_lora.models.recurrence.scan import Arrays, Marks, Step, scan

with allocation.file_limits_kept():
    from mlx_lm.models import ssm as theirs


def ssm_update(
    hidden_states: mx.array,
    A_log: mx.array,
    B: mx.array,
    C: mx.array,
    D: mx.array,
    dt: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    time_step_limit: tuple[float, float] = (0.001, 100.0),
    mask: mx.array | None = None,
    lengths: mx.array | None = None,
    *,
    segments: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """mlx_lm's function of this name: y (B, T, H, P) and the state (B, H, P, N) in float32.

    hidden_states (B, T, H, P); B, C (B, T, G, N), each for H / G heads; dt (B, T, H); A_log, D, dt_bias (H,).
    `mask` (B, T) bool: where it is False, the state doesn't change and y is meaningless. That includes positions at
    the end of a line, where mlx_lm's function loses the state. `segments`: see `resetting`; `state` belongs to the
    first position's segment. A single position goes to mlx_lm's function, and so do calls with `lengths`, which only
    batched generation uses.
    """
    lines, length, heads, depth = hidden_states.shape
    if length == 1 or lengths is not None:
        arguments = (hidden_states, A_log, B, C, D, dt, dt_bias, state, time_step_limit, mask, lengths)
        return theirs.ssm_update(*arguments)  # type: ignore[no-any-return]
    segments = current_segments() if segments is None else segments
    if state is None:
        state = mx.zeros((lines, heads, depth, B.shape[-1]), dtype=mx.float32)
    y, state = scan(
        _step(tuple(time_step_limit)),
        state.astype(mx.float32),
        (hidden_states, B, C, dt),
        (A_log, dt_bias),
        chunks.marks(segments, mask),
        span=chunks.span_length(decayed.held_bytes(lines, heads, depth, B.shape[-1])),
    )
    return y + hidden_states * D.reshape(1, 1, heads, 1), state


@lru_cache
def _step(time_step_limit: tuple[float, float]) -> Step:
    """The function of one span for these limits."""

    def step(state: mx.array, sequences: Arrays, constants: Arrays, marks: Marks) -> tuple[mx.array, mx.array]:
        x, B, C, dt = sequences
        A_log, dt_bias = constants
        mask = marks[2]
        dt = mx.clip(nn.softplus(dt.astype(mx.float32) + dt_bias), *time_step_limit)
        if mask is not None:
            dt = mx.where(mask[..., None], dt, 0)
        logarithms = dt * -mx.exp(A_log).astype(mx.float32)
        y, state = decayed.decayed_attention(state, C, B, dt[..., None] * x, logarithms, marks)
        return y.astype(x.dtype), state

    return step
