"""What chunked recurrences share: cutting a span into chunks, decays between positions, and borders of packed rows.

Arrays are cut to (B, n, Hk, G, C, …): n chunks of C positions, Hk heads of keys, each read by G heads of values.
Decays are at most 1 and only ever multiplied: to divide one product of them by another, or to subtract sums of their
logarithms, loses all digits after one very strong decay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_lora.machine import device
from mlx_lora.models.recurrence.triangular import joined

# Positions of a chunk. On a CPU, 32 took a quarter less time than 64 and half of 128's; a GPU wants larger products.
CHUNK, CHUNK_GPU = 32, 64
# Bytes that one span may hold for the time it runs. Few spans keep fewer states; small ones stay in a CPU's cache.
SPAN_BYTES, SPAN_BYTES_GPU = 32 << 20, 128 << 20


def longest() -> int:
    """Positions of a chunk that isn't cut short."""
    return CHUNK_GPU if device.on_gpu() else CHUNK


def span_length(chunk_bytes: int) -> int:
    """Positions of a span, given what a chunk of `longest` positions holds in the backward pass."""
    most = SPAN_BYTES_GPU if device.on_gpu() else SPAN_BYTES
    return longest() * max(most // chunk_bytes, 1)


def chunk_length(length: int) -> int:
    """Positions of a chunk: `longest`, or the next power of 2 that holds all of a shorter span."""
    return min(longest(), 1 << (length - 1).bit_length())


def cut(x: mx.array, heads: int, size: int) -> mx.array:
    """(B, T, H, …) as float32 (B, n, heads, H / heads, size, …), with zeros behind the last position."""
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
    """Where rows of a packed batch meet, in booleans for chunks (B, n, 1, 1, C)."""

    same: mx.array  # (…, C, C): both positions belong to one row
    carried: mx.array  # (…, C): the row of the state that enters the chunk
    last: mx.array  # (…, C): the row of the chunk's last position, whose state leaves it


def borders(segments: mx.array | None, before: mx.array | None, size: int) -> Borders | None:
    """Of `segments` (B, T), with `before` the segment of the position before; None where rows aren't packed."""
    if segments is None or before is None:
        return None
    lines, length = segments.shape
    widths = [(0, 0), (0, -length % size)]
    here, earlier = (mx.pad(x, widths, mode="edge").reshape(lines, -1, 1, 1, size) for x in (segments, before))
    same = here[..., :, None] == here[..., None, :]
    return Borders(same, here == earlier[..., :1], here == here[..., -1:])


def marks(segments: mx.array | None, mask: mx.array | None) -> tuple[mx.array | None, ...]:
    """(segments, the segment of the position before, mask): a state that enters belongs to the first position's."""
    if segments is None:
        return None, None, mask
    return segments, mx.concatenate([segments[:, :1], segments[:, :-1]], axis=1), mask


class Decays(NamedTuple):
    """Products of decays α (…, C, D) inside chunks; D is 1 where a head decays as a whole. All at most 1.

    `halves` is for blocks of 2, 4, … C positions, from small to large: decays from a block's middle to the positions of
    its second half, and from those of its first half to the middle, both (…, blocks, half a block, D).
    """

    halves: list[tuple[mx.array, mx.array]]
    entering: mx.array  # (…, C, D): from the state before the chunk to position i
    leaving: mx.array  # (…, C, D): from position j to the chunk's end
    total: mx.array  # (…, 1, D): from the state before the chunk to its end


def decays(alpha: mx.array, packed: Borders | None) -> Decays:
    """Products over ever longer blocks: nothing is divided or subtracted, so an α of 0 is as exact as any other."""
    entering = total = alpha[..., None, :]
    leaving = mx.ones_like(entering)
    levels = []
    while entering.shape[-3] > 1:
        (early, late), (first, second), (one, two) = halved(entering), halved(leaving), halved(total)
        levels.append((late, first))
        entering = mx.concatenate([early, late * one], axis=-2)
        leaving = mx.concatenate([first * two, second], axis=-2)
        total = one * two
    entering, leaving, total = (x[..., 0, :, :] for x in (entering, leaving, total))
    if packed is not None:
        entering = mx.where(packed.carried[..., None], entering, 0.0)
        leaving = mx.where(packed.last[..., None], leaving, 0.0)
        total = mx.where(packed.carried[..., -1:, None], total, 0.0)
    return Decays(levels, entering, leaving, total)


def within(decay: Decays, packed: Borders | None) -> mx.array:
    """Decay of a head from position j to i ≥ j, 0 elsewhere: (…, C, C)."""
    blocks = mx.ones((*decay.entering.shape[:-1], 1, 1))
    for late, early in decay.halves:
        upper, lower = halved(blocks)
        blocks = joined(upper, late * early.swapaxes(-1, -2), lower)
    return blocks[..., 0, :, :] if packed is None else mx.where(packed.same, blocks[..., 0, :, :], 0.0)


def halved(blocks: mx.array) -> tuple[mx.array, mx.array]:
    """Every first and every second of (…, blocks, rows, columns)."""
    first, second = unstacked(blocks.reshape(*blocks.shape[:-3], -1, 2, *blocks.shape[-2:]), axis=-3)
    return first, second


def unstacked(x: mx.array, *, axis: int) -> tuple[mx.array, ...]:
    """What lies along an axis, one by one.

    Together they have one gradient, where that of a slice is as large as what it is cut from. `mx.split` has that too,
    but where a function calls it twice with equal arrays, `mx.compile` can fail (IndexError).
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
