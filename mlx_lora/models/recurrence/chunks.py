"""Shared parts of chunked recurrences: cutting a span into chunks, decays between positions, borders of packed rows.

Arrays are cut to (B, n, Hk, G, C, …): n chunks of C positions, Hk key heads, each shared by G value heads. Decays are
at most 1 and are only multiplied. Dividing products of them, or subtracting sums of their logarithms, would lose all
digits after one very strong decay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_lora.machine import device
from mlx_lora.models.recurrence.triangular import joined

# Positions of a chunk. On a CPU, 32 took a quarter less time than 64, and half as long as 128. A GPU is efficient only
# with larger matrix products.
CHUNK, CHUNK_GPU = 32, 64
# Bytes of temporaries that one span may hold while it runs. Larger spans keep fewer states for the backward pass;
# smaller spans fit in a CPU's cache.
SPAN_BYTES, SPAN_BYTES_GPU = 32 << 20, 128 << 20


def longest() -> int:
    """Positions of a full chunk on this device."""
    return CHUNK_GPU if device.on_gpu() else CHUNK


def span_length(chunk_bytes: int) -> int:
    """Positions of a span, given the bytes that a chunk of `longest` positions holds in the backward pass."""
    span_bytes = SPAN_BYTES_GPU if device.on_gpu() else SPAN_BYTES
    return longest() * max(span_bytes // chunk_bytes, 1)


def chunk_length(length: int) -> int:
    """Positions of a chunk: `longest`, or for a shorter span the smallest power of 2 that holds all of it."""
    return min(longest(), 1 << (length - 1).bit_length())


def cut(x: mx.array, heads: int, size: int) -> mx.array:
    """(B, T, H, …) as float32 (B, n, heads, H / heads, size, …), padded with zeros after the last position."""
    lines, length, count, *rest = x.shape
    missing = -length % size
    if missing:
        x = mx.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
    x = x.astype(mx.float32).reshape(lines, -1, size, heads, count // heads, *rest)
    return mx.contiguous(x.transpose(0, 1, 3, 4, 2, *range(5, x.ndim)))


def uncut(y: mx.array, length: int) -> mx.array:
    """(B, n, Hk, G, C, D) as (B, length, Hk · G, D)."""
    lines, chunks, keys, groups, size, width = y.shape
    return y.transpose(0, 1, 4, 2, 3, 5).reshape(lines, chunks * size, keys * groups, width)[:, :length]


class Borders(NamedTuple):
    """Borders between the rows of a packed batch, as booleans for chunks (B, n, 1, 1, C)."""

    same: mx.array  # (…, C, C): both positions belong to the same row
    carried: mx.array  # (…, C): the position belongs to the row of the state that enters the chunk
    last: mx.array  # (…, C): the position belongs to the row of the chunk's last position, whose state leaves the chunk


def borders(segments: mx.array | None, before: mx.array | None, size: int) -> Borders | None:
    """Borders of `segments` (B, T); `before` is the segment of the position before. None if rows aren't packed."""
    if segments is None or before is None:
        return None
    lines, length = segments.shape
    widths = [(0, 0), (0, -length % size)]
    current, previous = (mx.pad(x, widths, mode="edge").reshape(lines, -1, 1, 1, size) for x in (segments, before))
    same = current[..., :, None] == current[..., None, :]
    return Borders(same, current == previous[..., :1], current == current[..., -1:])


def marks(segments: mx.array | None, mask: mx.array | None) -> tuple[mx.array | None, ...]:
    """(segments, segments of the position before, mask). The initial state belongs to the first position's segment."""
    if segments is None:
        return None, None, mask
    return segments, mx.concatenate([segments[:, :1], segments[:, :-1]], axis=1), mask


class Decays(NamedTuple):
    """Products of decays α (…, C, D) inside chunks, all at most 1; D is 1 if a head has one decay for all channels.

    `halves` has an entry for blocks of 2, 4, … C positions, from small to large: (decays from a block's middle to the
    positions of its second half, decays from the positions of its first half to the middle), both
    (…, blocks, half a block, D).
    """

    halves: list[tuple[mx.array, mx.array]]
    entering: mx.array  # (…, C, D): from the state before the chunk to position i
    leaving: mx.array  # (…, C, D): from position j to the chunk's end
    total: mx.array  # (…, 1, D): from the state before the chunk to its end


def decays(alpha: mx.array, packed: Borders | None) -> Decays:
    """`Decays` of α (…, C, D), by joining neighbouring blocks into ever longer ones.

    Nothing is divided or subtracted, so an α of 0 is as exact as any other.
    """
    entering = total = alpha[..., None, :]
    leaving = mx.ones_like(entering)
    levels = []
    while entering.shape[-3] > 1:
        entering_first, entering_second = halved(entering)
        leaving_first, leaving_second = halved(leaving)
        total_first, total_second = halved(total)
        levels.append((entering_second, leaving_first))
        entering = mx.concatenate([entering_first, entering_second * total_first], axis=-2)
        leaving = mx.concatenate([leaving_first * total_second, leaving_second], axis=-2)
        total = total_first * total_second
    entering, leaving, total = (x[..., 0, :, :] for x in (entering, leaving, total))
    if packed is not None:
        entering = mx.where(packed.carried[..., None], entering, 0.0)
        leaving = mx.where(packed.last[..., None], leaving, 0.0)
        total = mx.where(packed.carried[..., -1:, None], total, 0.0)
    return Decays(levels, entering, leaving, total)


def within(decay: Decays, packed: Borders | None) -> mx.array:
    """Decays of heads with one decay for all channels: from position j to i ≥ j, 0 elsewhere; (…, C, C)."""
    blocks = mx.ones((*decay.entering.shape[:-1], 1, 1))
    for entering, leaving in decay.halves:
        upper, lower = halved(blocks)
        blocks = joined(upper, entering * leaving.swapaxes(-1, -2), lower)
    return blocks[..., 0, :, :] if packed is None else mx.where(packed.same, blocks[..., 0, :, :], 0.0)


def halved(blocks: mx.array) -> tuple[mx.array, mx.array]:
    """The first and the second block of every pair of (…, blocks, rows, columns)."""
    first, second = unstacked(blocks.reshape(*blocks.shape[:-3], -1, 2, *blocks.shape[-2:]), axis=-3)
    return first, second


def unstacked(x: mx.array, *, axis: int) -> tuple[mx.array, ...]:
    """All slices of `x` along an axis, without that axis.

    All slices share one gradient array. With ordinary indexing, the gradient of every slice would be as large as `x`.
    `mx.split` avoids that too, but `mx.compile` can fail (IndexError) if a function calls it twice with equal arrays.
    """
    return _unstacking(axis % x.ndim)(x)  # type: ignore[no-any-return]


@lru_cache
def _unstacking(axis: int) -> Callable[..., Any]:
    @mx.custom_function  # type: ignore[untyped-decorator]
    def unstack(x: mx.array) -> tuple[mx.array, ...]:
        return tuple(x[(slice(None),) * axis + (index,)] for index in range(x.shape[axis]))

    @unstack.vjp  # type: ignore[untyped-decorator]
    def unstack_vjp(_: mx.array, cotangents: Sequence[mx.array], __: Any) -> mx.array:
        return mx.stack(list(cotangents), axis=axis)

    return unstack  # type: ignore[no-any-return]
