"""Caches that confine attention, states and short convolutions to segments, so that several rows can share one line.

mlx-lm's models get the attention mask from their cache, and pass keys and values through it. The caches here return a
mask under which a position attends only to positions of its own row. They return keys and values unchanged and store
nothing across passes, so the forward pass can be compiled, differentiated and recomputed as usual. Rotary positions
continue from row to row; that changes nothing, because only their differences matter. `models.recurrence` resets
recurrent states at the borders between rows; it gets the segments from the layer's cache (`lean.py`). Not every
architecture works this way: `packing.py` runs the model and compares.
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
    """Masks of one packed batch, each built once for all layers that use it."""

    def __init__(self, segment_ids: mx.array, *, grouped: bool):
        self.segment_ids, self.length = segment_ids, segment_ids.shape[1]
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        self._same_segment = mx.expand_dims(same, (1, 2) if grouped else 1)
        self._by_window: dict[int | None, mx.array] = {}

    def within(self, window: int | None) -> mx.array:
        """Bool (B, 1, T, T): i may attend to j if both are in one row and 0 ≤ i - j < `window`. None is no window."""
        window = window if window and window < self.length else None
        if window not in self._by_window:
            self._by_window[window] = self._same_segment & create_causal_mask(self.length, window_size=window)
        return self._by_window[window]


class RowCache:
    """Cache of one layer whose keys and values upper layers reuse: it passes them on within one forward pass.

    Gemma 3n's upper layers reuse the keys of lower ones only if there is a cache, and when it is served there is one.
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
    """Cache of one attention layer for packed rows: gives it the mask and the offset, returns its keys and values."""

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
    """State cache of one mixer for packed rows: the state starts empty and isn't stored at the end of the line.

    Where the state is computed, `segments` int32 (B, T) tell at which positions to reset it.
    """

    def __init__(self, masks: _Masks, size: int):
        super().__init__(size)
        self.segments = masks.segment_ids

    def __setitem__(self, index: int, value: Any) -> None:
        pass

    def make_mask(self, length: int) -> None:
        return None


def caches(model: nn.Module, segment_ids: mx.array, *, first: int = 0, shares_keys: bool = False) -> list[Any]:
    """The caches to pass to the model or its trunk so that rows in one line don't affect each other.

    `segment_ids` int32 (B, T): one number for the positions of a row, rows one after another, 0 for padding. Make new
    caches for every forward pass. Rotary positions start at `first`. With `shares_keys`, layers pass keys on in their
    caches. Raises ModelError for a model with caches whose contents can't be separated by row.
    """
    kinds = make_prompt_cache(model)
    if reason := not_separable(kinds):
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
    """Caches for rows that aren't packed, through which layers share keys; None if a layer caches something else."""
    kinds = make_prompt_cache(model)
    return [RowCache() for _ in kinds] if all(type(kind) in (KVCache, RotatingKVCache) for kind in kinds) else None


def keeps_state(model: nn.Module) -> bool:
    """Whether some layer caches a state rather than keys and values of positions."""
    return any(not hasattr(kind, "update_and_fetch") for kind in _leaves(make_prompt_cache(model)))


def segments_of(arguments: Iterable[Any]) -> mx.array | None:
    """The segments of a packed line, from the cache among a layer's arguments; None if rows aren't packed."""
    for argument in arguments:
        if isinstance(argument, PackedCache | PackedState):
            return argument.segments
        if isinstance(argument, tuple) and (segments := segments_of(list(argument))) is not None:
            return segments
    return None


def _grouped(model: nn.Module) -> bool:
    """Whether attention scores are (B, kv heads, group, T, T), as in Gemma 2, which computes them itself."""
    return getattr(model, "model_type", "") == "gemma2" and model.layers[0].self_attn.repeats > 1


def not_separable(kinds: list[Any]) -> str | None:
    """Why layers with caches of these kinds can't be confined to segments, or None if the kinds allow it."""
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
