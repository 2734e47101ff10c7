"""One answer: events of its row in, the changes that a stream shows out, and the message that they add up to."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mlx_lora.models.tool_calls import ToolFormat
from mlx_lora.serve.openai.split import Part, Splitter
from mlx_lora.serve.requests import Event, Finished, Token
from mlx_lora.serve.text import Piece, TextStream


class Change(NamedTuple):
    """What a stream shows next: a part of the message, with the tokens of its text."""

    delta: dict[str, Any]
    tokens: list[Token]


@dataclass(frozen=True)
class Calls:
    """How an answer may call tools: the format, the tools as the request has them, whether several calls may come."""

    format: ToolFormat
    tools: Sequence[Any]
    several: bool = True


@dataclass
class Choice:
    """The answer of one row. `stream` is its text, `splitter` parts it; `calls` is None where no tool may be called.

    `finished` is there once it has ended. `enough`: the row should be cancelled, for the answer is complete.
    """

    stream: TextStream
    splitter: Splitter
    calls: Calls | None = None
    finished: Finished | None = None
    tokens: int = 0
    reasoning_tokens: int = 0
    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    shown_tokens: list[Token] = field(default_factory=list)
    _waiting: deque[tuple[int, Token]] = field(default_factory=deque)
    _length: int = 0
    _complete: bool = False

    @property
    def enough(self) -> bool:
        return self._complete or self.stream.stopped is not None

    @property
    def finish_reason(self) -> str:
        """Why it ended. An answer that was cut off, by a limit or by the end of the server, says length."""
        if self.tool_calls:
            return "tool_calls"
        stopped = self.enough or (self.finished is not None and self.finished.reason == "stop")
        return "stop" if stopped else "length"

    def take(self, event: Event) -> list[Change]:
        """What an event of the row changes."""
        changes: list[Change] = []
        if isinstance(event, Token) and not self.enough:
            self.tokens += 1
            changes = list(self._text(self.stream.push(event)))
        elif isinstance(event, Finished):
            self.finished = event
            changes = list(self._text(self.stream.finish()))
            changes += [change for part in self.splitter.finish() for change in self._part(part)]
        return changes

    def _text(self, piece: Piece | None) -> Iterator[Change]:
        if piece is None:
            return
        self._length += len(piece.text)
        self._waiting += [(self._length, token) for token in piece.tokens]
        for part in self.splitter.push(piece.text):
            yield from self._part(part)

    def _part(self, part: Part) -> Iterator[Change]:
        """The change of a part; nothing after the last call that may come."""
        tokens = []
        while self._waiting and self._waiting[0][0] <= part.end:
            tokens.append(self._waiting.popleft()[1])
        if self._complete:
            return
        if part.kind == "reasoning":
            self.reasoning.append(part.text)
            self.reasoning_tokens += len(tokens)
            yield Change({"reasoning": part.text, "reasoning_content": part.text}, [])
        elif part.kind == "call" and (calls := self._read(part)):
            self.tool_calls += calls
            yield Change({"tool_calls": calls}, [])
        elif part.kind in ("content", "call"):
            text = part.text if part.kind == "content" else part.raw
            self.content.append(text)
            self.shown_tokens += tokens
            yield Change({"content": text}, tokens)

    def _read(self, part: Part) -> list[dict[str, Any]]:
        """The calls of a part; none where it can't be read, and it is text then."""
        assert self.calls
        try:
            found = self.calls.format.read(part.text, self.calls.tools)
        except ValueError:
            return []
        if not self.calls.several:
            found, self._complete = found[:1], True
        first = len(self.tool_calls)
        return [
            {"index": first + place, "id": f"call_{secrets.token_hex(12)}", "type": "function",
             "function": {"name": call.name, "arguments": call.arguments}}
            for place, call in enumerate(found)
        ]  # fmt: skip

    def message(self) -> dict[str, Any]:
        """The whole message."""
        text = "".join(self.content)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self.tool_calls:
            message["content"] = text or None
            message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in self.tool_calls]
        if self.reasoning:
            message["reasoning"] = message["reasoning_content"] = "".join(self.reasoning)
        return message
