"""A short causal convolution whose window stops at the border between two packed rows, fast on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, reduce
from operator import add
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.machine import device
from mlx_lora.models.recurrence.resets import current_segments


class CausalConv1d(nn.Conv1d):
    """What a layer's depthwise `nn.Conv1d` becomes, to run as `convolved`: the same arrays, another class."""

    def __call__(self, x: mx.array) -> mx.array:
        return convolved(self, x)


def is_short(conv: nn.Conv1d) -> bool:
    """Whether a convolution is depthwise, without stride, padding or dilation: what `convolved` serves."""
    return conv.weight.shape[-1] == 1 and (conv.stride, conv.padding, conv.dilation) == (1, 0, 1)


def convolved(conv: nn.Conv1d, x: mx.array, segments: mx.array | None = None) -> mx.array:
    """y (B, T, C) of a depthwise `conv` of K taps over x (B, T + K - 1, C), each row as if it stood alone.

    y_t = bias + Σ_k w_k x_{t+k} [position t+k-K+1 is of the same segment]. The first K - 1 positions of x are what came
    before: they belong to the first position's segment. Taps are added up one by one, which on a CPU is several times
    faster than MLX's convolution. Raises ValueError for a convolution that mixes channels, skips positions or pads.
    """
    taps = conv.weight.shape[1]
    if not is_short(conv):
        raise ValueError(f"only a depthwise convolution without stride, padding or dilation, not {conv}")
    segments = current_segments() if segments is None else segments
    if segments is None and device.on_gpu():
        return conv(x) if type(conv) is nn.Conv1d else nn.Conv1d.__call__(conv, x)  # type: ignore[no-any-return]
    y: mx.array = _tapped(taps)(x, conv.weight[..., 0], *([] if segments is None else [segments]))
    return y + conv.bias if "bias" in conv else y


@lru_cache
def _tapped(taps: int) -> Callable[..., mx.array]:
    """The sum over taps; its gradient by x is one too, where that of a slice is as large as what it is cut from."""

    def inside(x: mx.array, here: slice, segments: mx.array, around: mx.array) -> mx.array:
        return mx.where((around[:, here] == segments)[..., None], x[:, here], 0)

    def added(parts: list[mx.array], weight: mx.array) -> mx.array:
        """The sum over taps, in float32 as MLX's convolution makes it, and in the parts' dtype at the end."""
        products = (part.astype(mx.float32) * weight[:, tap] for tap, part in enumerate(parts))
        return reduce(add, products).astype(parts[0].dtype)  # type: ignore[no-any-return]

    def widened(segments: mx.array) -> mx.array:
        return mx.pad(segments, [(0, 0), (taps - 1, 0)], mode="edge")

    def windows(length: int) -> list[slice]:
        return [slice(tap, tap + length) for tap in range(taps)]

    @mx.custom_function  # type: ignore[untyped-decorator]
    def tapped(x: mx.array, weight: mx.array, *packed: mx.array) -> mx.array:
        borders = [(packed[0], widened(packed[0]))] if packed else []
        found = windows(x.shape[1] - taps + 1)
        seen = [inside(x, here, *borders[0]) if borders else x[:, here] for here in found]
        return added(seen, weight)

    @tapped.vjp  # type: ignore[untyped-decorator]
    def tapped_vjp(primals: tuple[mx.array, ...], cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
        x, weight, *packed = primals
        sides = [(0, 0), (taps - 1, taps - 1)]
        wide = mx.pad(cotangent, [*sides, (0, 0)])
        after = windows(x.shape[1])[::-1]  # position u is read by tap k at u - k
        if packed:
            around, outputs = widened(packed[0]), mx.pad(packed[0], sides)
            parts = [inside(wide, here, around, outputs) for here in after]
            found = [inside(x, here, packed[0], around) for here in windows(cotangent.shape[1])]
        else:
            parts = [wide[:, here] for here in after]
            found = [x[:, here] for here in windows(cotangent.shape[1])]
        by_x = added(parts, weight)
        by_weight = mx.stack([(part * cotangent).sum(axis=(0, 1)) for part in found], axis=1)
        return (by_x, by_weight, *(mx.zeros_like(array) for array in packed))

    return tapped  # type: ignore[no-any-return]
