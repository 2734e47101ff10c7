"""Room in memory for rows: one that would make the machine swap waits for others to end, or is refused.

What the machine has left is looked at, since other programs take of it too. What is kept of prompts goes first.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_lora import ui
from mlx_lora.errors import NoMemory
from mlx_lora.machine import limits
from mlx_lora.serve.memory import MakeCache, row_growth
from mlx_lora.serve.prompt_cache import PromptCache
from mlx_lora.serve.running import Row

# Tokens of an answer that room is made for at its beginning: few answers are as long as they may be.
ANSWER = 256
# Seconds between two looks at the machine.
LOOK = 0.5
HINT = "ask again when other answers have ended, or ask for a shorter one"


class Room:
    """For the thread that owns MLX; may let all of `prompts` go. Made while `model` has no adapters.

    `make_cache` makes the caches of a row, None for the model's own.
    """

    def __init__(self, model: nn.Module, prompts: PromptCache, make_cache: MakeCache | None = None):
        self._prompts, self._looked = prompts, 0.0
        self._missing, self._missed = 0, 0.0  # bytes that weren't there for a row that waits, and when that was
        self._row_bytes = row_growth(model, make_cache)

    def admits(self, row: Row, running: Sequence[Row]) -> bool:
        """Whether a row may begin beside those that run, which will take more than they have taken so far.

        False where it waits for them to end. Raises NoMemory where there are none.
        """
        needed = self._at_most(row)
        for other in running:
            taken = len(other.tokens) if other.answer else other.read
            needed += max(self._at_most(other) - self._row_bytes(taken), 0)
        if running and needed >= self._missing > 0 and time.monotonic() - self._missed < LOOK:
            return False  # many rows may wait, and looking at the machine takes time
        self._missing = 0
        if needed <= self._free(needed):
            return True
        if running:
            self._missing, self._missed = needed, time.monotonic()
            return False
        raise NoMemory(
            f"{len(row.prompt):,} tokens and their answer take {ui.size(needed)}, which this machine doesn't have left",
            hint=HINT,
        )

    def _at_most(self, row: Row) -> int:
        """Bytes of a row whose answer has as many tokens as room is made for."""
        return self._row_bytes(len(row.prompt) + min(row.most, ANSWER))

    def fault(self) -> NoMemory | None:
        """What is wrong where the machine is about to swap; looked at now and then, None in between."""
        if time.monotonic() - self._looked < LOOK:
            return None
        self._looked = time.monotonic()  # what a row held that is ended now is free by the next look
        if self._free(0) >= 0:
            return None
        return NoMemory("the machine was about to swap, so the answer that began last was ended", hint=HINT)

    def _free(self, needed: int) -> int:
        """Bytes that are free, after prompts and freed arrays that are kept were let go where they don't suffice."""
        free = limits.free_bytes()
        if free < needed:
            self._prompts.shrink(0)
            mx.clear_cache()
            free = limits.free_bytes()
        return free
