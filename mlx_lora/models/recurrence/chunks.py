"""What chunked recurrences share: cutting a span into chunks, decays between positions, and borders of packed rows.

Arrays are cut to (B, n, Hk, G, C, …): n chunks of C positions, Hk heads of keys, each read by G heads of values.
Decays come as logarithms, formed without taking one: log e⁻²⁰⁰ is -∞ in float32. No sum is the
difference of two others, which has lost its digits after one very strong decay. Exponents are -∞ before `exp` where a pair must not meet, so nothing overflows and no gradient is NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mlx_lora import device
from mlx_lora.models.recurrence.triangular import ROWS, joined

CHUNK = 64
# Positions of a block whose pairs are computed one by one; more would cost more than the small products saved.
PAIRS = 4
# Bytes that one span may hold for the time it runs. Few spans keep fewer states; small ones stay in a CPU's cache.
SPAN_BYTES, SPAN_BYTES_GPU = 32 << 20, 128 << 20


def span_length(chunk_bytes: int) -> int:
    """Positions of a span, given what a chunk of CHUNK positions holds in the backward pass."""
    most = SPAN_BYTES_GPU if device.on_gpu() else SPAN_BYTES
    return CHUNK * max(most // chunk_bytes, 1)


def chunk_length(length: int) -> int:
    """Positions of a chunk: CHUNK, or the next of 16, 32, … that holds all of a shorter span."""
    size = ROWS
    while size < min(length, CHUNK):
        size *= 2
    return size


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
    """Decays of a chunk whose heads decay as a whole, float32."""

    within: mx.array  # (…, C, C): from position j to i ≥ j, 0 elsewhere
    entering: mx.array  # (…, C): from the state before the chunk to position i
    leaving: mx.array  # (…, C): from position j to the chunk's end
    total: mx.array  # (…): from the state before the chunk to its end


def decays(logarithms: mx.array, packed: Borders | None) -> Decays:
    """Decays from their logarithms (…, C), each before the position's own update.

    Between two halves the decay is a product of two that are at most 1: to the second half's position from the border,
    and from the first half's to the border. Only blocks of PAIRS positions take an exponential for each pair.
    """
    blocks = pairs(logarithms[..., None])[..., 0]
    size = PAIRS
    while size < logarithms.shape[-1]:
        rows, columns = halves(logarithms[..., None], size)
        blocks = joined(blocks[..., 0::2, :, :], rows * columns.swapaxes(-1, -2), blocks[..., 1::2, :, :])
        size *= 2
    within = blocks[..., 0, :, :] if packed is None else mx.where(packed.same, blocks[..., 0, :, :], 0.0)
    entering, leaving = ends(logarithms, packed, axis=-1)
    return Decays(within, entering, leaving, entering[..., -1])


def pairs(logarithms: mx.array) -> mx.array:
    """Decays inside blocks of PAIRS positions, 0 above the diagonal: (…, C, D) to (…, blocks, PAIRS, PAIRS, D)."""
    found = logarithms.reshape(*logarithms.shape[:-2], -1, PAIRS, 1, logarithms.shape[-1])
    earlier, lower = (mx.tri(PAIRS, k=k, dtype=mx.bool_)[:, :, None] for k in (-1, 0))  # type: ignore[arg-type]
    sums = mx.cumsum(mx.where(earlier, found, 0.0), axis=-3)
    return mx.exp(mx.where(lower, sums, -mx.inf))


def halves(logarithms: mx.array, size: int) -> tuple[mx.array, mx.array]:
    """Blocks of 2·size positions: decays from their middle to the second half, and from the first half to the middle.

    (…, C, D) to (…, blocks, size, D) twice.
    """
    first, second = halved(logarithms, size)
    entering = mx.exp(mx.cumsum(second, axis=-2))
    return entering, mx.exp(mx.cumsum(first, axis=-2, reverse=True, inclusive=False))


def halved(x: mx.array, size: int) -> list[mx.array]:
    """First and second halves of blocks of 2·size positions of (…, C, D), each (…, blocks, size, D)."""
    return [half[..., 0, :, :] for half in mx.split(x.reshape(*x.shape[:-2], -1, 2, size, x.shape[-1]), 2, axis=-3)]


def ends(logarithms: mx.array, packed: Borders | None, *, axis: int) -> tuple[mx.array, mx.array]:
    """(entering, leaving) of `Decays`, each of the shape of `logarithms`, along the axis of positions."""
    entering = mx.exp(mx.cumsum(logarithms, axis=axis))
    leaving = mx.exp(mx.cumsum(logarithms, axis=axis, reverse=True, inclusive=False))
    if packed is None:
        return entering, leaving
    carried, last = (x if axis == -1 else x[..., None] for x in (packed.carried, packed.last))
    return mx.where(carried, entering, 0.0), mx.where(last, leaving, 0.0)
