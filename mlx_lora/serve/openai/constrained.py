"""A row that keeps to a grammar: where in its answer the grammar begins, and what it allows next."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora.errors import MlxLoraError
from mlx_lora.serve.openai.penalties import AnswerTokens


@dataclass(frozen=True)
class Gate:
    """Where in an answer its grammar begins, by tokens.

    opened, think   reasoning comes first where the prompt has opened it, or where the answer's first token is the first
                    of `think[0]`; the grammar begins after `think[1]`
    trigger         the grammar begins with these tokens, if they come; before them anything goes
    """

    opened: bool = False
    think: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    trigger: tuple[int, ...] = ()

    def begin(self, answer: Sequence[int]) -> int | None:
        """The index in `answer` where the grammar begins, None where it hasn't yet."""
        start, end = self.think
        place: int | None = 0
        if self.opened or (start and answer and answer[0] == start[0]):
            place = find(answer, end, 0)
            place = None if place is None else place + len(end)
        if place is not None and self.trigger:
            place = find(answer, self.trigger, place)
        return place

    def may_think(self, answer: Sequence[int]) -> int | None:
        """The token that opens reasoning, where it may come next."""
        start = self.think[0]
        return start[0] if start and not answer and not self.opened else None


class Constrained:
    """The processor of a row: minus infinity for every token that the grammar doesn't allow.

    `matcher` stands at the grammar's beginning. A prompt has `length` tokens; `ends` are those that end an answer. A
    row that begins again gives other tokens than the last time: then they are read from the grammar's beginning.
    """

    def __init__(self, matcher: Any, length: int, gate: Gate, ends: Collection[int] = ()):
        self._first, self._length, self._gate, self._ends = matcher, length, gate, frozenset(ends)
        self._matcher, self._read = matcher.deep_copy(), list[int]()
        self._answer = AnswerTokens(length)

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        mx.async_eval(logits)  # the device computes them while the mask is made
        answer = self._answer(tokens)
        begin = self._gate.begin(answer)
        if begin is None or not self._ends.isdisjoint(answer[begin:]):
            return logits  # tokens behind an end aren't looked at: of a pass that was on its way, or of a draft
        self._follow(answer[begin:])
        allowed = self._allowed(logits.shape[-1])
        if (opening := self._gate.may_think(answer)) is not None:
            allowed[opening] = True
        return mx.where(mx.array(allowed), logits, mx.array(-mx.inf, logits.dtype))

    def copy(self) -> Constrained:
        """One for another row with the same prompt."""
        return Constrained(self._first, self._length, self._gate, self._ends)

    def _follow(self, answer: list[int]) -> None:
        """Bring the matcher to the end of `answer`."""
        if answer[: len(self._read)] != self._read:
            self._matcher, self._read = self._first.deep_copy(), []
        more = answer[len(self._read) :]
        if more and not self._matcher.consume_tokens(more):
            raise MlxLoraError(f"the grammar can't go on: {self._matcher.get_error()[:200]}")
        self._read = answer

    def _allowed(self, width: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which of `width` tokens may come next."""
        packed = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise MlxLoraError(f"the grammar can't go on: {self._matcher.get_error()[:200]}")
        bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little", count=None)[:width].astype(bool)
        return np.pad(bits, (0, width - len(bits)))


def find(tokens: Sequence[int], wanted: Sequence[int], start: int) -> int | None:
    """Where `wanted` begins in `tokens`, from `start` on."""
    last = len(tokens) - len(wanted)
    while wanted and start <= last:
        try:
            place = tokens.index(wanted[0], start, last + 1)
        except ValueError:
            return None
        if tuple(tokens[place : place + len(wanted)]) == tuple(wanted):
            return place
        start = place + 1
    return None
