"""Attention kept inside segments, so that several training rows can share one packed row.

mlx-lm's models ask their cache for the mask and let it replace keys and values. The caches here answer with a mask
that joins a position only to those of its own row, hand keys and values back unchanged and keep nothing, so the
forward pass is an ordinary one: it can be compiled, differentiated and recomputed. Rotary positions run on from row to
row, which changes nothing, being relative. This file doesn't know which architectures that is true of: `refusal` runs
the model and compares.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import CacheList, ChunkedKVCache, KVCache, RotatingKVCache, make_prompt_cache

from mlx_lora.errors import ModelError

# Lengths of the rows that `refusal` packs, two packed rows of WIDTH positions: the rest is padding.
TRIAL = ((5, 12, 8), (9, 14))
WIDTH = 26
# Largest distance from a row's logits alone, relative to their norm. Half precision rounds another shape of batch
# differently and can send a token to another expert; a leak moves logits by tens of percent.
TOLERANCE, TOLERANCE_HALF = 1e-3, 5e-2
# Positions up to which float32 rotary angles stay well inside the tolerance.
EXACT_POSITIONS = 8192


class _Masks:
    """Masks of one packed batch, each built once however many layers use it."""

    def __init__(self, segment_ids: mx.array, *, grouped: bool):
        self.length = segment_ids.shape[1]
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        self._same = mx.expand_dims(same, (1, 2) if grouped else 1)
        self._made: dict[int | None, mx.array] = {}

    def within(self, window: int | None) -> mx.array:
        """Where position i may look at j: the same row, not later, and fewer than `window` before. Bool (B, 1, T, T)"""
        window = window if window and window < self.length else None
        if window not in self._made:
            self._made[window] = self._same & create_causal_mask(self.length, window_size=window)
        return self._made[window]


class PackedCache:
    """Stands in for the cache of one layer, of which attention wants a mask, an offset and the keys and values."""

    def __init__(self, masks: _Masks, offset: int):
        self.offset = offset
        self._masks = masks

    def make_mask(self, length: int, return_array: bool = True, window_size: int | None = None) -> mx.array:
        if length != self._masks.length:
            raise ModelError(f"the model asks for a mask over {length} of {self._masks.length} packed positions")
        return self._masks.within(window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values


def caches(model: nn.Module, segment_ids: mx.array) -> list[Any]:
    """What to pass as `cache` to the model or its trunk so that attention stays inside segments.

    `segment_ids` int32 (B, T): one number for the positions of a row, rows one after another, 0 for padding. Make them
    anew for every forward pass. Raises ModelError for a model whose layers keep something else than keys and values.
    """
    return _caches(model, segment_ids, first=0)


def _caches(model: nn.Module, segment_ids: mx.array, *, first: int) -> list[Any]:
    """`caches` whose rotary positions start at `first`."""
    kinds = make_prompt_cache(model)
    if reason := _state(kinds):
        raise ModelError(f"rows can't be packed for {type(model).__module__.rpartition('.')[2]}: {reason}")
    masks = _Masks(segment_ids, grouped=_grouped(model))

    def like(kind: Any) -> Any:
        return tuple(map(like, kind.caches)) if isinstance(kind, CacheList) else PackedCache(masks, first)

    return [like(kind) for kind in kinds]


def _grouped(model: nn.Module) -> bool:
    """Whether attention scores are (B, kv heads, queries of a key, T, T): Gemma 2 computes them itself."""
    return getattr(model, "model_type", "") == "gemma2" and model.layers[0].self_attn.repeats > 1


def _state(kinds: list[Any]) -> str | None:
    """Why layers with caches of these kinds can't be kept inside segments."""
    for kind in _leaves(kinds):
        if isinstance(kind, ChunkedKVCache):
            return "its attention is cut into chunks at fixed positions"
        if type(kind) not in (KVCache, RotatingKVCache):
            return f"its layers keep a state that runs across rows ({type(kind).__name__})"
    return None


def _leaves(kinds: Any) -> Iterator[Any]:
    for kind in kinds:
        if isinstance(kind, CacheList):
            yield from _leaves(kind.caches)
        else:
            yield kind


def refusal(model: nn.Module, *, length: int = WIDTH) -> str | None:
    """Why rows can't be packed for this model, or None when they can: verified numerically.

    `length` is that of the packed rows to come. The trial is short, but it sits at the end of those positions: some
    models scale attention or rotary frequencies by the absolute position once it is large.
    """
    training = model.training
    model.eval()
    try:
        if reason := _state(make_prompt_cache(model)):
            return reason
        if _isolated(model, max(length - WIDTH, 0)):
            return None
    except Exception as error:  # an architecture that wants more of a cache than a mask, or takes none
        return f"it can't be run on packed rows: {error} ({type(error).__name__})"
    finally:
        model.train(training)
    return "packed rows don't give the logits of the rows alone"


def _isolated(model: nn.Module, first: int) -> bool:
    """Whether the trial's rows, packed from position `first` on, have the logits that each has alone."""
    tokens = (mx.arange(len(TRIAL) * WIDTH) * 7 % 31 + 1).reshape(len(TRIAL), WIDTH)
    ends = [list(accumulate(row)) for row in TRIAL]
    ids = [[1 + bisect_right(line, place) if place < line[-1] else 0 for place in range(WIDTH)] for line in ends]
    packed = model(tokens, cache=_caches(model, mx.array(ids), first=first))
    distances = []
    for line, row in enumerate(TRIAL):
        for end, length in zip(ends[line], row, strict=True):
            alone = model(tokens[line : line + 1, end - length : end])[0].astype(mx.float32)
            distances.append(mx.linalg.norm(packed[line, end - length : end] - alone) / mx.linalg.norm(alone))
    tolerance = _tolerance(model) * max(1.0, first / EXACT_POSITIONS)
    return bool(mx.all(mx.stack(distances) <= tolerance).item())


def _tolerance(model: nn.Module) -> float:
    half = any(array.dtype in (mx.float16, mx.bfloat16) for _, array in tree_flatten(model.parameters()))
    return TOLERANCE_HALF if half else TOLERANCE
