"""Keys, values and states of prompts that were read before, for prompts that begin in the same way.

An entry belongs to one adapter, or to the base: what another adapter computed is never used. A cache that can be
trimmed serves any prompt that shares its beginning; one that can't (states that run along the row, windows that have
moved on) only those that have all of its tokens. For these the scheduler also keeps what they were at the end of a
prompt, and where a prompt parts from one that is known.

The bytes are bounded; the entry that was used longest ago goes first.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_lora.machine import allocation

with allocation.file_limits_kept():
    from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache


@dataclass(frozen=True)
class _Entry:
    key: Hashable | None
    tokens: NDArray[np.int64]
    layers: list[Any]
    nbytes: int
    trimmable: bool


class PromptCache:
    """At most `limit` bytes of caches, by adapter key (None for the base) and tokens. For the thread that owns MLX."""

    def __init__(self, limit: int):
        self.limit = limit
        self.nbytes = self.hits = self.misses = 0
        self._entries: OrderedDict[int, _Entry] = OrderedDict()  # the one used last at the end
        self._number = count()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: Hashable | None, tokens: Sequence[int]) -> tuple[list[Any] | None, int]:
        """Caches of the longest known beginning of `tokens`, and its length: at least one token is left to read.

        (None, 0) where there is none. The caller may change what it gets.
        """
        wanted = np.asarray(tokens, np.int64)
        best, length = None, 0
        for number, entry in self._entries.items():
            if entry.key == key and (usable := _usable(entry, wanted)) > length:
                best, length = number, usable
        if best is None:
            self.misses += 1
            return None, 0
        self.hits += 1
        self._entries.move_to_end(best)
        entry = self._entries[best]
        layers = copy.deepcopy(entry.layers)  # arrays are shared until one side changes them
        if length < len(entry.tokens):
            trim_prompt_cache(layers, len(entry.tokens) - length)
        return layers, length

    def shared(self, key: Hashable | None, tokens: Sequence[int]) -> int:
        """How many tokens at the beginning are those of an entry, whether or not it can serve them."""
        wanted = np.asarray(tokens, np.int64)
        found = (common(entry.tokens, wanted) for entry in self._entries.values() if entry.key == key)
        return max(found, default=0)

    def put(self, key: Hashable | None, tokens: Sequence[int], layers: list[Any]) -> None:
        """Keep the caches of `tokens`. Entries that are a beginning of them, and no more use, go."""
        if any(layer.empty() for layer in layers) or not len(tokens):
            return
        entry = _Entry(
            key, np.asarray(tokens, np.int64), layers, sum(layer.nbytes for layer in layers),
            trimmable(layers, len(tokens)),
        )  # fmt: skip
        if entry.nbytes > self.limit:
            return
        for number, other in list(self._entries.items()):
            same = other.key == key and common(other.tokens, entry.tokens) == len(other.tokens)
            if same and (entry.trimmable or len(other.tokens) == len(entry.tokens)):
                self._remove(number)
        self._entries[next(self._number)] = entry
        self.nbytes += entry.nbytes
        while self.nbytes > self.limit:
            self._remove(next(iter(self._entries)))

    def drop(self, key: Hashable | None) -> None:
        """Forget all entries of an adapter that is gone."""
        for number, entry in list(self._entries.items()):
            if entry.key == key:
                self._remove(number)

    def shrink(self, limit: int) -> None:
        """Let the oldest entries go until at most `limit` bytes are left."""
        while self.nbytes > limit:
            self._remove(next(iter(self._entries)))

    def _remove(self, number: int) -> None:
        self.nbytes -= self._entries.pop(number).nbytes


def common(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    """The length of the beginning that two rows of tokens share."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if different.size else length


def trimmable(layers: Sequence[Any], length: int) -> bool:
    """Whether caches can be trimmed when they hold `length` tokens."""
    return length < trimmable_up_to(layers)


def trimmable_up_to(layers: Sequence[Any]) -> float:
    """Caches can be trimmed while they hold fewer tokens than this: a window that is full has lost what would be next.

    mlx_lm says so of its rotating windows, and not of those of llama4.
    """
    if not can_trim_prompt_cache(layers):
        return 0
    inner = [cache for layer in layers for cache in getattr(layer, "caches", [layer])]
    sizes = [getattr(cache, name, None) for cache in inner for name in ("max_size", "chunk_size")]
    return min((size for size in sizes if isinstance(size, int)), default=float("inf"))


def _usable(entry: _Entry, wanted: NDArray[np.int64]) -> int:
    """How many tokens of `wanted` an entry saves; one is always left to read."""
    shared = common(entry.tokens, wanted)
    if shared == len(entry.tokens) and shared < len(wanted):
        return shared
    return min(shared, len(wanted) - 1) if entry.trimmable else 0
