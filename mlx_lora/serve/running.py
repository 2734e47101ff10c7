"""A request on its way through a lane, and what comes out of it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_lora.serve.lookup import Lookup
from mlx_lora.serve.requests import Deliver, Finished, Request, Token
from mlx_lora.serve.residence import Held


@dataclass(eq=False)
class Row:
    """A request on its way. `prompt` has the virtual tokens of its adapter, `answer` all tokens that were chosen.

    The answer has at most `most` tokens; `shown` of them have been delivered. A `suspect` was in a pass that failed: it
    runs by itself until it has made a token. While `loading` its adapter is on the way. Where caches are `untrimmable`,
    those of the row's beginning are kept. `begun` is when it came into its lane; `read` tokens of its prompt have been
    read since then, with the `cached` ones.
    """

    request: Request
    deliver: Deliver
    held: Held | None = None
    prompt: list[int] = field(default_factory=list)
    answer: list[Token] = field(default_factory=list)
    begun: float = 0.0
    ends: frozenset[int] = frozenset()
    most: int = 0
    shown: int = 0
    cached: int = 0
    read: int = 0
    uid: int | None = None
    suspect: bool = False
    loading: bool = False
    untrimmable: bool = False
    error: BaseException | None = None
    sample: Any = None
    lookup: Lookup | None = None

    @property
    def key(self) -> Hashable | None:
        return self.held.key if self.held else None

    @property
    def tokens(self) -> list[int]:
        return self.prompt + [token.token for token in self.answer]

    def finished(self, reason: str) -> Finished:
        return Finished(reason, len(self.prompt), self.cached, len(self.answer))


@dataclass(frozen=True)
class Ended:
    """A row that left a lane, with the caches that it left behind and the tokens that they hold."""

    row: Row
    reason: str
    layers: list[Any] | None = None
    tokens: Sequence[int] = ()


@dataclass(frozen=True)
class Kept:
    """Caches of the beginning of a row that goes on; `tokens` are what they hold."""

    row: Row
    layers: list[Any]
    tokens: Sequence[int]


def as_token(token: int, log_probabilities: mx.array, count: int | None) -> Token:
    """A token with its log-probability, of those (V,) that it was chosen from, and `count` of the most likely ones."""
    if count is None:
        return Token(token)
    count = min(count, log_probabilities.size)
    top: list[int] = mx.argsort(-log_probabilities)[:count].tolist() if count else []  # type: ignore[assignment]
    values: list[float] = log_probabilities[mx.array([token, *top])].tolist()  # type: ignore[assignment]
    return Token(token, values[0], tuple(zip(top, values[1:], strict=True)))


def beginning_of(stops: Sequence[tuple[int, ...]], tokens: Sequence[int]) -> int:
    """How many of the last tokens are the beginning of a stop sequence."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for count in range(min(longest, len(tokens)), 0, -1):
        if any(len(stop) > count and tuple(tokens[-count:]) == stop[:count] for stop in stops):
            return count
    return 0


def guarded(row: Any, processor: Any) -> Any:
    """A processor whose error becomes the `error` of its own row: raised inside a pass it would end all rows."""

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        if row.error is not None:
            return logits
        try:
            found = processor(tokens, logits)
            if found.shape != logits.shape:
                raise ValueError(f"a logits processor made {found.shape} of {logits.shape}")
            return found  # type: ignore[no-any-return]
        except Exception as error:
            row.error = error
            return logits

    return process
