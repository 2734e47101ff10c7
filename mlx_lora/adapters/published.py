"""What is known of the rows of one forward pass: their adapters, and which of them each stack of factors has."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_lora.adapters.stacks import Stack
from mlx_lora.errors import AdapterError


@dataclass(frozen=True)
class Share:
    """The rows of a pass that have an adapter in one stack.

    `rows` are their indices, None for all rows, and `slots` those of their adapters. Where all rows have one adapter,
    `slots` has this one alone. `every` is the slot of each row of the pass, 0 for the others.
    """

    stack: Stack
    rows: mx.array | None
    slots: mx.array
    every: mx.array
    single: bool


@dataclass
class Pass:
    """One forward pass: the adapter of each row by its key, None for the base, and how many tokens a row has."""

    keys: tuple[Hashable | None, ...]
    tokens: int
    shares: dict[tuple[int, int], list[Share]] = field(default_factory=dict)
    order: mx.array | None = None  # tokens sorted by their experts

    def row_of_sorted(self, count: int) -> mx.array:
        """The row of each of `count` sorted choices of experts."""
        if self.order is None or self.order.size != count:
            raise AdapterError("this model's experts sort their tokens in a way of their own, which loses the rows")
        return self.order // self.tokens
