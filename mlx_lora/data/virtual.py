"""Where rows and prompts have the virtual tokens of prompt tuning: in front of everything, or behind the prompt.

    prefix    −1 −2 … −l  <s> user: 2+2? assistant:  4 </s>      before the whole sequence, as in the paper and in PEFT
    infix     <s> user: 2+2? assistant:  −1 −2 … −l  4 </s>      between the prompt and the first token with loss

They are ids below 0 (`adapters.prompt` says why) and never carry loss. In a conversation they stay where the first
prompt had them, so a turn that follows finds the same beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_lora import methods
from mlx_lora.config import Adapter
from mlx_lora.data.rows import Row


@dataclass(frozen=True)
class Virtual:
    """`count` virtual tokens at `position`, prefix or infix."""

    count: int
    position: str = "prefix"

    def place(self, row: Row) -> int:
        """The index in a row before which they go."""
        return 0 if self.position == "prefix" else int(np.flatnonzero(row.weights)[0])

    def row(self, row: Row) -> Row:
        """A row with them, and without loss on them."""
        place = self.place(row)
        ids = np.arange(-1, -1 - self.count, -1, dtype=row.tokens.dtype)
        weights = np.zeros(self.count, row.weights.dtype)
        return Row(np.insert(row.tokens, place, ids), np.insert(row.weights, place, weights))

    def prompt(self, tokens: Sequence[int], place: int | None = None) -> list[int]:
        """Prompt tokens with them; an infix goes before index `place`, or to the end."""
        if self.position == "prefix":
            place = 0
        start = len(tokens) if place is None else place
        return [*tokens[:start], *range(-1, -1 - self.count, -1), *tokens[start:]]


def virtual_of(settings: Adapter) -> Virtual | None:
    """The virtual tokens that rows have for an adapter with these settings, None for most methods."""
    return Virtual(settings.virtual_tokens, settings.position) if "prompt" in methods.parts(settings.method) else None
