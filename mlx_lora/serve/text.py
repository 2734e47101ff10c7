"""The text of one row's tokens, as they come. It knows neither model nor threads.

A token may hold half a character, and the end of the text may be the beginning of a stop string: both are held back
until it is known what they become.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lora.errors import MlxLoraError
from mlx_lora.serve.requests import Token


@dataclass(frozen=True)
class Piece:
    """A piece of an answer's text, and the tokens whose text is complete with it."""

    text: str
    tokens: tuple[Token, ...] = ()


class TextStream:
    """Tokens in, pieces of text out. `stopped` is the stop string that has come: the answer ends before it."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        if not all(stops):
            raise MlxLoraError("a stop string is empty")
        self.stopped: str | None = None
        self._stops = tuple(stops)
        self._detokenizer = tokenizer.detokenizer
        self._text = ""  # all of it, with what is held back and what the stop string cut off
        self._given = 0  # characters that are in pieces
        self._waiting: deque[tuple[Token, int]] = deque()  # tokens without a piece, and where their text ends

    def push(self, token: Token) -> Piece | None:
        """The text that is certain with one more token. None where there is none, and after a stop string."""
        if self.stopped is not None:
            return None
        self._detokenizer.add_token(token.token)
        return self._take(self._detokenizer.last_segment, token)

    def finish(self) -> Piece | None:
        """What was held back, once the answer has ended."""
        if self.stopped is not None:
            return None
        self._detokenizer.finalize()
        piece = self._take(self._detokenizer.last_segment)
        if self.stopped is not None:
            return piece
        rest = self._piece(len(self._text), last=True)
        parts = [part for part in (piece, rest) if part is not None]
        tokens = tuple(token for part in parts for token in part.tokens)
        return Piece("".join(part.text for part in parts), tokens) if parts else None

    def _take(self, segment: str, token: Token | None = None) -> Piece | None:
        """Add a segment, and cut the text at the first stop string in it."""
        longest = max(map(len, self._stops), default=0)
        start = max(len(self._text) - longest + 1, 0)  # a stop string that began before has come already
        self._text += segment
        if token is not None:
            self._waiting.append((token, len(self._text)))
        found = [(place, stop) for stop in self._stops if (place := self._text.find(stop, start)) >= 0]
        if found:
            end, self.stopped = min(found, key=lambda one: (one[0], -len(one[1])))
            return self._piece(end)
        return self._piece(len(self._text) - self._held_back(longest))

    def _held_back(self, longest: int) -> int:
        """How many of the last characters may become a stop string."""
        for count in range(min(longest - 1, len(self._text)), 0, -1):
            if any(len(stop) > count and self._text.endswith(stop[:count]) for stop in self._stops):
                return count
        return 0

    def _piece(self, end: int, *, last: bool = False) -> Piece | None:
        """The text up to `end` that no piece has, with the tokens that end there; tokens without text wait for some."""
        if end <= self._given and not last:
            return None
        tokens: list[Token] = []
        while self._waiting and self._waiting[0][1] <= end:
            tokens.append(self._waiting.popleft()[0])
        text, self._given = self._text[self._given : end], max(self._given, end)
        return Piece(text, tuple(tokens)) if text or tokens else None
