"""A short causal convolution that doesn't read across the border between two packed rows; fast on a CPU."""

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
    """The class that `trunk.lean` gives a layer's depthwise `nn.Conv1d`: the same arrays, computed by `convolved`."""

    def __call__(self, x: mx.array) -> mx.array:
        return convolved(self, x)


def is_short(conv: nn.Conv1d) -> bool:
    """Whether a convolution is depthwise, without stride, padding or dilation, as `convolved` requires."""
    return conv.weight.shape[-1] == 1 and (conv.stride, conv.padding, conv.dilation) == (1, 0, 1)


def convolved(conv: nn.Conv1d, x: mx.array, segments: mx.array | None = None) -> mx.array:
    """y (B, T, C) of a depthwise `conv` of K taps over x (B, T + K - 1, C), with each packed row computed separately.

    y_t = bias + Σ_k w_k x_{t+k} [position t+k-K+1 is in the same segment]. The first K - 1 positions of x precede the
    line and belong to the first position's segment. Taps are summed one by one, which on a CPU is several times faster
    than MLX's convolution. Raises ValueError for a convolution that mixes channels, skips positions or pads.
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
    """The convolution as a sum over taps.

    Its gradient by x is computed as another sum over taps: autodiff would make an array as large as x for each slice.
    """

    def masked(x: mx.array, window: slice, segments: mx.array, x_segments: mx.array) -> mx.array:
        """A window of x, with 0 at positions whose segment differs from `segments`."""
        return mx.where((x_segments[:, window] == segments)[..., None], x[:, window], 0)

    def summed(inputs: list[mx.array], weight: mx.array) -> mx.array:
        """The sum over taps, in float32 like MLX's convolution; the result has the inputs' dtype."""
        products = (x.astype(mx.float32) * weight[:, tap] for tap, x in enumerate(inputs))
        return reduce(add, products).astype(inputs[0].dtype)  # type: ignore[no-any-return]

    def extended(segments: mx.array) -> mx.array:
        return mx.pad(segments, [(0, 0), (taps - 1, 0)], mode="edge")

    def windows(length: int) -> list[slice]:
        return [slice(tap, tap + length) for tap in range(taps)]

    @mx.custom_function  # type: ignore[untyped-decorator]
    def tapped(x: mx.array, weight: mx.array, *packed: mx.array) -> mx.array:
        shifts = windows(x.shape[1] - taps + 1)
        if packed:
            x_segments = extended(packed[0])
            return summed([masked(x, window, packed[0], x_segments) for window in shifts], weight)
        return summed([x[:, window] for window in shifts], weight)

    @tapped.vjp  # type: ignore[untyped-decorator]
    def tapped_vjp(primals: tuple[mx.array, ...], cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
        x, weight, *packed = primals
        padding = [(0, 0), (taps - 1, taps - 1)]
        padded = mx.pad(cotangent, [*padding, (0, 0)])
        reverse = windows(x.shape[1])[::-1]  # input position u enters output position u - k through tap k
        shifts = windows(cotangent.shape[1])
        if packed:
            x_segments, y_segments = extended(packed[0]), mx.pad(packed[0], padding)
            cotangents = [masked(padded, window, x_segments, y_segments) for window in reverse]
            inputs = [masked(x, window, packed[0], x_segments) for window in shifts]
        else:
            cotangents = [padded[:, window] for window in reverse]
            inputs = [x[:, window] for window in shifts]
        x_gradient = summed(cotangents, weight)
        weight_gradient = mx.stack([(shifted * cotangent).sum(axis=(0, 1)) for shifted in inputs], axis=1)
        return (x_gradient, weight_gradient, *(mx.zeros_like(array) for array in packed))

    return tapped  # type: ignore[no-any-return]
