"""A short causal convolution whose window stops at the border between two packed rows."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.models.recurrence.resets import current_segments


def convolved(conv: nn.Conv1d, x: mx.array, segments: mx.array | None = None) -> mx.array:
    """y (B, T, C) of a depthwise `conv` of K taps over x (B, T + K - 1, C), each row as if it stood alone.

    y_t = bias + Σ_k w_k x_{t+k} [position t+k-K+1 is of the same segment]. The first K - 1 positions of x are what came
    before: they belong to the first position's segment. Without segments this is conv(x). Raises ValueError for a
    convolution that mixes channels, skips positions or pads.
    """
    segments = current_segments() if segments is None else segments
    if segments is None:
        return conv(x)  # type: ignore[no-any-return]
    channels, taps, mixed = conv.weight.shape
    if mixed != 1 or channels != x.shape[-1] or (conv.stride, conv.padding, conv.dilation) != (1, 0, 1):
        raise ValueError(f"only a depthwise convolution without stride, padding or dilation, not {conv}")
    length = segments.shape[1]
    around = mx.pad(segments, [(0, 0), (taps - 1, 0)], mode="edge")
    y: mx.array = conv.bias if "bias" in conv else mx.zeros((), x.dtype)
    for tap in range(taps):
        same = around[:, tap : tap + length] == segments
        y = y + mx.where(same[..., None], x[:, tap : tap + length], 0) * conv.weight[:, tap, 0]
    return y
