"""Attention that keeps queries, keys and values for the backward pass, and computes its scores again.

It runs over a few queries at a time, so no square of scores is ever held; under a causal mask the keys behind a part
are left out, which halves the work of long rows. A mask that is an array (packed rows, some sliding windows) is a
square of its own, of one byte an entry, and leaves no keys out. A mask of numbers is added to the scores and gets a
gradient: latent attention (DeepSeek, GLM, Kimi, LongCat) hands over scores of trained positions that way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx

from mlx_lora.machine import allocation, device, elementary

with allocation.file_limits_kept():
    from mlx_lm.models import base

# Bytes of the scores of one part of the queries; a GPU wants more of them at a time.
SCORES_BYTES, SCORES_BYTES_GPU = 16 << 20, 128 << 20


def scaled_dot_product_attention(
    queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: Any, sinks: Any = None
) -> mx.array:
    """softmax(scale · q kᵀ + mask) v, keeping q, k and v; (B, heads, T, d) with fewer heads of keys and values.

    Quantized caches and attention sinks take mlx-lm's own way.
    """
    if hasattr(cache, "bits") or sinks is not None:
        return base.scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)  # type: ignore[no-any-return]
    masks = [mask] if isinstance(mask, mx.array) else []
    return _attention(scale, mask == "causal" if not masks else False)(queries, keys, values, *masks)


def _parts(queries: mx.array, keys: mx.array, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Which queries run together, and the keys that they may look at."""
    lines, heads, length, _ = queries.shape
    before = keys.shape[2] - length
    size = SCORES_BYTES_GPU if device.on_gpu() else SCORES_BYTES
    count = -(-queries.dtype.size * lines * heads * length * keys.shape[2] // size)
    step = -(-length // count)
    for start in range(0, length, step):
        end = min(start + step, length)
        yield slice(start, end), slice(0, before + end if causal else None)


def _probabilities(
    queries: mx.array, keys: mx.array, here: slice, masks: Sequence[mx.array], scale: float, causal: bool
) -> mx.array:
    """(B, kv heads, queries of a key, part, keys)."""
    scores = (queries * scale) @ keys.swapaxes(-1, -2)
    if causal:
        first = keys.shape[-2] - (here.stop - here.start)
        allowed = mx.arange(first, keys.shape[-2])[:, None] >= mx.arange(keys.shape[-2])
        scores = mx.where(allowed, scores, mx.finfo(scores.dtype).min)
    for mask in masks:
        mask = _grouped(mask, scores)[..., here, :] if mask.shape[-2] > 1 else _grouped(mask, scores)
        boolean = mask.dtype == mx.bool_
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min) if boolean else scores + mask.astype(scores.dtype)
    return elementary.softmax(scores)


@lru_cache
def _attention(scale: float, causal: bool) -> Callable[..., mx.array]:
    @mx.custom_function  # type: ignore[untyped-decorator]
    def attend(queries: mx.array, keys: mx.array, values: mx.array, *masks: mx.array) -> mx.array:
        if device.on_gpu():  # its kernel holds no square either
            mask = "causal" if causal else masks[0] if masks else None
            return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
        grouped, k, v = _by_key(queries, keys), keys[:, :, None], values[:, :, None]
        made = [grouped]
        for here, seen in _parts(queries, keys, causal):
            (part,) = mx.depends([grouped[..., here, :]], made[-1:])  # one after another
            made.append(_probabilities(part, k[..., seen, :], here, masks, scale, causal) @ v[..., seen, :])
        return _joined(made[1:]).reshape(*queries.shape[:-1], values.shape[-1])

    @attend.vjp  # type: ignore[untyped-decorator]
    def attend_vjp(primals: tuple[mx.array, ...], cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
        queries, keys, values, *masks = mx.depends(list(primals), [cotangent])
        grouped, k, v = _by_key(queries, keys), keys[:, :, None], values[:, :, None]
        out = cotangent.reshape(*grouped.shape[:-1], values.shape[-1])
        by_queries: list[mx.array] = []
        by_masks: list[list[mx.array]] = [[] for _ in masks]
        by_keys = by_values = None
        after, length = [grouped], keys.shape[2]
        for here, seen in _parts(queries, keys, causal):
            (part,) = mx.depends([grouped[..., here, :]], after)
            chosen = _probabilities(part, k[..., seen, :], here, masks, scale, causal)
            by_chosen = out[..., here, :] @ v[..., seen, :].swapaxes(-1, -2)
            by_sums = chosen * (by_chosen - (chosen * by_chosen).sum(axis=-1, keepdims=True))  # of scores and mask
            by_scores = by_sums * scale
            by_queries.append(by_scores @ k[..., seen, :])
            by_keys = _added(by_keys, (by_scores.swapaxes(-1, -2) @ part).sum(axis=2), length)
            by_values = _added(by_values, (chosen.swapaxes(-1, -2) @ out[..., here, :]).sum(axis=2), length)
            for of_mask, mask in zip(by_masks, masks, strict=True):
                of_mask.append(_summed_like(mask, by_sums))
            after = [by_queries[-1], by_keys, by_values]
        of_masks = (_gradient_of(mask, parts) for mask, parts in zip(masks, by_masks, strict=True))
        return (_joined(by_queries).reshape(queries.shape), by_keys, by_values, *of_masks)

    return attend  # type: ignore[no-any-return]


def _by_key(queries: mx.array, keys: mx.array) -> mx.array:
    """Queries (B, heads, T, d) by the head of keys that they look at: (B, kv heads, queries of a key, T, d)."""
    lines, heads, length, width = queries.shape
    return queries.reshape(lines, keys.shape[1], heads // keys.shape[1], length, width)


def _grouped(mask: mx.array, scores: mx.array) -> mx.array:
    """A mask that fits scores (B, heads, T, T), as one that fits them by head of keys."""
    if mask.ndim < 3 or mask.shape[-3] == 1:
        return mask if mask.ndim < 3 else mask[..., None, :, :]
    return mask.reshape(*mask.shape[:-3], *scores.shape[1:3], *mask.shape[-2:])


def _summed_like(mask: mx.array, by_sums: mx.array) -> mx.array:
    """What a part of the queries (B, kv heads, queries of a key, part, keys) adds to a mask's gradient.

    (B, heads, part, keys), summed over the axes along which the mask is broadcast.
    """
    lines, _, _, part, seen = by_sums.shape
    shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    broadcast = [axis for axis in range(4) if shape[axis] == 1]
    return by_sums.reshape(lines, -1, part, seen).sum(axis=broadcast, keepdims=True)


def _gradient_of(mask: mx.array, parts: list[mx.array]) -> mx.array:
    """A mask's gradient from its parts; zeros for a boolean one. It is computed only where something asks for it."""
    if mask.dtype == mx.bool_:
        return mx.broadcast_to(mx.zeros((), mask.dtype), mask.shape)
    whole = _joined(parts) if mask.shape[-2] > 1 else sum(parts[1:], start=parts[0])
    return whole.reshape(mask.shape).astype(mask.dtype)


def _added(total: mx.array | None, part: mx.array, length: int) -> mx.array:
    """`total` plus what the first keys of `length` get."""
    missing = length - part.shape[2]
    part = mx.pad(part, [(0, 0), (0, 0), (0, missing), (0, 0)]) if missing else part
    return part if total is None else total + part


def _joined(parts: list[mx.array]) -> mx.array:
    """Parts of the queries behind one another."""
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-2)
