"""The rows of a batch: which adapter each has, carried through mlx_lm's BatchGenerator and published for every pass.

BatchGenerator moves rows between batches by their caches: it merges, extends, filters and extracts them. So the first
entry of a row's caches isn't a cache but `RowsEntry`, which holds the adapters of the rows. `RowsModel` stands where
BatchGenerator expects a model; it takes that entry off and publishes it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

# Publishes the adapters of rows, by their keys, for one pass of so many tokens a row.
Publish = Callable[[Sequence[Hashable | None], int], AbstractContextManager[None]]


class RowsEntry:
    """The keys of the adapters of a batch's rows, in order. It has the methods of one of mlx_lm's batch caches."""

    nbytes = 0
    state: tuple[()] = ()

    def __init__(self, keys: Sequence[Hashable | None]):
        self.keys = list(keys)

    def merge(self, entries: Sequence[RowsEntry]) -> RowsEntry:
        return RowsEntry([key for entry in entries for key in entry.keys])

    def extend(self, other: RowsEntry) -> None:
        self.keys += other.keys

    def filter(self, indices: Sequence[int]) -> None:
        self.keys = [self.keys[index] for index in indices]

    def extract(self, index: int) -> RowsEntry:
        return RowsEntry([self.keys[index]])

    def prepare(self, **_: Any) -> None:
        """Padding changes nothing here."""

    def finalize(self) -> None:
        """Nor does the end of it."""

    def is_trimmable(self) -> bool:
        return True

    def trim(self, count: int) -> int:
        """A row that takes tokens back has the same adapter."""
        return count

    def __deepcopy__(self, memo: dict[int, Any]) -> RowsEntry:
        return RowsEntry(self.keys)  # the keys themselves are compared, not owned


class RowsModel:
    """A model whose rows have adapters. `passes` counts forward passes."""

    def __init__(self, model: nn.Module, publish: Publish):
        self.model, self.publish, self.passes = model, publish, 0

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        entry, *layers = cache
        self.passes += 1
        with self.publish(entry.keys, tokens.shape[1]):
            return self.model(tokens, cache=layers)
