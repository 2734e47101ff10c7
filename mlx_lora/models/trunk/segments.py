"""Attention, states and short convolutions kept inside segments, so that several training rows can share one line.

mlx-lm's models ask their cache for the mask and let it replace keys and values. The caches here answer with a mask
that joins a position only to those of its own row, hand keys and values back unchanged and keep nothing, so the
forward pass is an ordinary one: it can be compiled, differentiated and recomputed. Rotary positions run on from row to
row, which changes nothing, being relative. A state that runs along the line is reset at the borders by
`models.recurrence`, which a layer's cache tells the segments (`lean.py`). This file doesn't know which architectures
all of that is true of: `verify.py` runs the model and compares.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, KVCache, RotatingKVCache, make_prompt_cache

from mlx_lora.errors import ModelError


class _Masks:
    """Masks of one packed batch, each built once however many layers use it."""

    def __init__(self, segment_ids: mx.array, *, grouped: bool):
        self.segment_ids, self.length = segment_ids, segment_ids.shape[1]
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        self._same = mx.expand_dims(same, (1, 2) if grouped else 1)
        self._made: dict[int | None, mx.array] = {}

    def within(self, window: int | None) -> mx.array:
        """Where position i may look at j: the same row, not later, and fewer than `window` before. Bool (B, 1, T, T)"""
        window = window if window and window < self.length else None
        if window not in self._made:
            self._made[window] = self._same & create_causal_mask(self.length, window_size=window)
        return self._made[window]


class RowCache:
    """Stands in for the cache of one layer where layers above use its keys and values: it hands them on, within a pass.

    Gemma 3n's upper layers look at keys of lower ones wherever there is a cache, as there is when it is served.
    """

    def __init__(self, offset: int = 0, *, shares_keys: bool = True):
        self.offset, self.SHARED_ARRAYS = offset, ("keys", "values") if shares_keys else ()
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Any:
        windowed = window_size is not None and length > window_size
        return create_causal_mask(length, window_size=window_size) if windowed or return_array else "causal"

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = keys, values
        return keys, values

    def keys_and_values(self) -> tuple[mx.array | None, mx.array | None]:
        return self.keys, self.values


class PackedCache(RowCache):
    """Stands in for the cache of one layer, of which attention wants a mask, an offset and the keys and values."""

    def __init__(self, masks: _Masks, offset: int, *, shares_keys: bool):
        super().__init__(offset, shares_keys=shares_keys)
        self._masks = masks

    @property
    def segments(self) -> mx.array:
        """int32 (B, T)."""
        return self._masks.segment_ids

    def make_mask(self, length: int, return_array: bool = True, window_size: int | None = None) -> mx.array:
        if length != self._masks.length:
            raise ModelError(f"the model asks for a mask over {length} of {self._masks.length} packed positions")
        return self._masks.within(window_size)


class PackedState(ArraysCache):
    """Stands in for the state cache of one mixer: nothing came before, and nothing is kept behind the line.

    Resets at the borders between rows are made where the state is computed, by `segments` int32 (B, T).
    """

    def __init__(self, masks: _Masks, size: int):
        super().__init__(size)
        self.segments = masks.segment_ids

    def __setitem__(self, index: int, value: Any) -> None:
        pass

    def make_mask(self, length: int) -> None:
        return None


def caches(model: nn.Module, segment_ids: mx.array, *, first: int = 0, shares_keys: bool = False) -> list[Any]:
    """What to pass as `cache` to the model or its trunk so that rows in one line don't reach each other.

    `segment_ids` int32 (B, T): one number for the positions of a row, rows one after another, 0 for padding. Make them
    anew for every forward pass. Rotary positions start at `first`. `shares_keys` says that layers hand keys on in their
    caches. Raises ModelError for a model whose layers keep something that can't be kept apart.
    """
    kinds = make_prompt_cache(model)
    if reason := crossing(kinds):
        raise ModelError(f"rows can't be packed for {type(model).__module__.rpartition('.')[2]}: {reason}")
    masks = _Masks(segment_ids, grouped=_grouped(model))

    def like(kind: Any) -> Any:
        if isinstance(kind, CacheList):
            return tuple(map(like, kind.caches))
        return (
            PackedState(masks, len(kind.cache))
            if type(kind) is ArraysCache
            else PackedCache(masks, first, shares_keys=shares_keys)
        )

    return [like(kind) for kind in kinds]


def row_caches(model: nn.Module) -> list[RowCache] | None:
    """The `cache` for rows alone of a model whose layers hand keys on in it, or None where some keep something else."""
    kinds = make_prompt_cache(model)
    return [RowCache() for _ in kinds] if all(type(kind) in (KVCache, RotatingKVCache) for kind in kinds) else None


def keeps_state(model: nn.Module) -> bool:
    """Whether some layer keeps more than keys and values of positions."""
    return any(not hasattr(kind, "update_and_fetch") for kind in _leaves(make_prompt_cache(model)))


def segments_of(arguments: Iterable[Any]) -> mx.array | None:
    """The segments of a packed line that a layer's arguments tell of, or None for rows alone."""
    for argument in arguments:
        if isinstance(argument, PackedCache | PackedState):
            return argument.segments
        if isinstance(argument, tuple) and (found := segments_of(list(argument))) is not None:
            return found
    return None


def _grouped(model: nn.Module) -> bool:
    """Whether attention scores are (B, kv heads, queries of a key, T, T): Gemma 2 computes them itself."""
    return getattr(model, "model_type", "") == "gemma2" and model.layers[0].self_attn.repeats > 1


def crossing(kinds: list[Any]) -> str | None:
    """Why layers with caches of these kinds can't be kept inside segments, where their kind alone tells."""
    for kind in _leaves(kinds):
        if isinstance(kind, ChunkedKVCache):
            return "its attention is cut into chunks at fixed positions"
        if type(kind) not in (KVCache, RotatingKVCache, ArraysCache):
            return f"its layers keep something of their own ({type(kind).__name__})"
    return None


def _leaves(kinds: Any) -> Iterator[Any]:
    for kind in kinds:
        if isinstance(kind, CacheList):
            yield from _leaves(kind.caches)
        else:
            yield kind
