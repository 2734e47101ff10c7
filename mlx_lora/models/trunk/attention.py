"""Attention that keeps only queries, keys and values for the backward pass and recomputes its scores.

It processes a block of queries at a time, so the full (T, T) matrix of scores never exists. Under a causal mask, keys
later than the block's last query are skipped, which halves the work of long rows. An array mask (packed rows, some
sliding windows) is itself a (T, T) matrix of one byte an entry, and no keys are skipped under it. A floating-point
mask is added to the scores and gets a gradient: latent attention (DeepSeek, GLM, Kimi, LongCat) passes trained
positional scores as such a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx

from mlx_lora.machine import allocation, device, elementary

with allocation.file_limits_kept():
    from mlx_lm.models import base

# Bytes of the scores of one block of queries; a GPU is efficient only with larger blocks.
SCORES_BYTES, SCORES_BYTES_GPU = 16 << 20, 128 << 20


def scaled_dot_product_attention(
    queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: Any, sinks: Any = None
) -> mx.array:
    """softmax(scale · q kᵀ + mask) v, (B, heads, T, d); keys and values may have fewer heads.

    Keeps q, k and v for the backward pass. Quantized caches and attention sinks use mlx-lm's own function.
    """
    if hasattr(cache, "bits") or sinks is not None:
        return base.scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)  # type: ignore[no-any-return]
    masks = [mask] if isinstance(mask, mx.array) else []
    return _attention(scale, mask == "causal" if not masks else False)(queries, keys, values, *masks)


def _blocks(queries: mx.array, keys: mx.array, causal: bool) -> Iterator[tuple[slice, slice]]:
    """For each block of queries: its positions, and the positions of the keys that it may attend to."""
    lines, heads, length, _ = queries.shape
    cached = keys.shape[2] - length
    size = SCORES_BYTES_GPU if device.on_gpu() else SCORES_BYTES
    count = -(-queries.dtype.size * lines * heads * length * keys.shape[2] // size)
    step = -(-length // count)
    for start in range(0, length, step):
        end = min(start + step, length)
        yield slice(start, end), slice(0, cached + end if causal else None)


def _probabilities(
    queries: mx.array, keys: mx.array, rows: slice, masks: Sequence[mx.array], scale: float, causal: bool
) -> mx.array:
    """Attention weights of one block of queries, the positions `rows`: (B, kv heads, group, block, keys)."""
    scores = (queries * scale) @ keys.swapaxes(-1, -2)
    if causal:
        first = keys.shape[-2] - (rows.stop - rows.start)
        allowed = mx.arange(first, keys.shape[-2])[:, None] >= mx.arange(keys.shape[-2])
        scores = mx.where(allowed, scores, mx.finfo(scores.dtype).min)
    for mask in masks:
        mask = _grouped(mask, scores)[..., rows, :] if mask.shape[-2] > 1 else _grouped(mask, scores)
        boolean = mask.dtype == mx.bool_
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min) if boolean else scores + mask.astype(scores.dtype)
    return elementary.softmax(scores)


@lru_cache
def _attention(scale: float, causal: bool) -> Callable[..., mx.array]:
    @mx.custom_function  # type: ignore[untyped-decorator]
    def attend(queries: mx.array, keys: mx.array, values: mx.array, *masks: mx.array) -> mx.array:
        if device.on_gpu():  # MLX's GPU kernel doesn't build the full matrix of scores either
            mask = "causal" if causal else masks[0] if masks else None
            return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
        grouped, k, v = _by_key_head(queries, keys), keys[:, :, None], values[:, :, None]
        outputs: list[mx.array] = []
        for rows, visible in _blocks(queries, keys, causal):
            # each block waits for the previous one, so only one block's scores are in memory
            (block,) = mx.depends([grouped[..., rows, :]], outputs[-1:] or [grouped])
            weights = _probabilities(block, k[..., visible, :], rows, masks, scale, causal)
            outputs.append(weights @ v[..., visible, :])
        return _concatenated(outputs).reshape(*queries.shape[:-1], values.shape[-1])

    @attend.vjp  # type: ignore[untyped-decorator]
    def attend_vjp(primals: tuple[mx.array, ...], cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
        queries, keys, values, *masks = mx.depends(list(primals), [cotangent])
        grouped, k, v = _by_key_head(queries, keys), keys[:, :, None], values[:, :, None]
        dout = cotangent.reshape(*grouped.shape[:-1], values.shape[-1])
        dqueries: list[mx.array] = []
        dmasks: list[list[mx.array]] = [[] for _ in masks]
        dkeys = dvalues = None
        previous, length = [grouped], keys.shape[2]
        for rows, visible in _blocks(queries, keys, causal):
            (block,) = mx.depends([grouped[..., rows, :]], previous)
            weights = _probabilities(block, k[..., visible, :], rows, masks, scale, causal)
            dweights = dout[..., rows, :] @ v[..., visible, :].swapaxes(-1, -2)
            dlogits = weights * (dweights - (weights * dweights).sum(axis=-1, keepdims=True))  # of scale · q kᵀ + mask
            dscores = dlogits * scale
            dqueries.append(dscores @ k[..., visible, :])
            dkeys = _added(dkeys, (dscores.swapaxes(-1, -2) @ block).sum(axis=2), length)
            dvalues = _added(dvalues, (weights.swapaxes(-1, -2) @ dout[..., rows, :]).sum(axis=2), length)
            for blocks, mask in zip(dmasks, masks, strict=True):
                blocks.append(_summed_like(mask, dlogits))
            previous = [dqueries[-1], dkeys, dvalues]
        mask_gradients = (_gradient_of(mask, blocks) for mask, blocks in zip(masks, dmasks, strict=True))
        return (_concatenated(dqueries).reshape(queries.shape), dkeys, dvalues, *mask_gradients)

    return attend  # type: ignore[no-any-return]


def _by_key_head(queries: mx.array, keys: mx.array) -> mx.array:
    """Queries (B, heads, T, d) grouped by the key head that they attend to: (B, kv heads, group, T, d)."""
    lines, heads, length, width = queries.shape
    return queries.reshape(lines, keys.shape[1], heads // keys.shape[1], length, width)


def _grouped(mask: mx.array, scores: mx.array) -> mx.array:
    """A mask that broadcasts to (B, heads, T, T), reshaped to broadcast to (B, kv heads, group, T, T)."""
    if mask.ndim < 3 or mask.shape[-3] == 1:
        return mask if mask.ndim < 3 else mask[..., None, :, :]
    return mask.reshape(*mask.shape[:-3], *scores.shape[1:3], *mask.shape[-2:])


def _summed_like(mask: mx.array, dlogits: mx.array) -> mx.array:
    """The gradient that one block of queries, `dlogits` (B, kv heads, group, block, keys), contributes to a mask.

    (B, heads, block, keys), summed over the axes along which the mask is broadcast.
    """
    lines, _, _, rows, keys = dlogits.shape
    shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    broadcast = [axis for axis in range(4) if shape[axis] == 1]
    return dlogits.reshape(lines, -1, rows, keys).sum(axis=broadcast, keepdims=True)


def _gradient_of(mask: mx.array, blocks: list[mx.array]) -> mx.array:
    """A mask's gradient from those of the blocks of queries; zeros for a boolean mask. Lazy: evaluated only if used."""
    if mask.dtype == mx.bool_:
        return mx.broadcast_to(mx.zeros((), mask.dtype), mask.shape)
    gradient = _concatenated(blocks) if mask.shape[-2] > 1 else sum(blocks[1:], start=blocks[0])
    return gradient.reshape(mask.shape).astype(mask.dtype)


def _added(total: mx.array | None, gradient: mx.array, length: int) -> mx.array:
    """`total` plus the gradient of the first keys, padded with zeros to all `length` keys."""
    missing = length - gradient.shape[2]
    gradient = mx.pad(gradient, [(0, 0), (0, 0), (0, missing), (0, 0)]) if missing else gradient
    return gradient if total is None else total + gradient


def _concatenated(blocks: list[mx.array]) -> mx.array:
    """Blocks of queries, concatenated along the positions."""
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=-2)
