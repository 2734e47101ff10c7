"""JSON values one after another out of a stream of text, with the line each begins on; no more than one is held."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

from mlx_lora.data.readers.base import Unreadable

CHUNK = 1 << 16
# An error this near to the end of what was read may only mean that a value goes on.
NEAR = 64


class Scanner:
    """A position in a stream of JSON text. Raises Unreadable, with its line, where the text isn't JSON."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.text, self.at, self.line = "", 0, 1
        self.ended = False
        self.decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that isn't white space, "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self._to(self.at + 1)
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def take(self, expected: str) -> str:
        """Pass over the next character, which must be one of `expected`."""
        if (character := self.peek()) not in expected or not character:
            wanted = " or ".join(f"'{each}'" for each in expected)
            raise Unreadable(f"not valid JSON (expecting {wanted})", self.line)
        self._to(self.at + 1)
        return character

    def value(self) -> Any:
        """The next value, whatever it is."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - NEAR
                if not (unfinished and self._more()):
                    line = self.line + self.text.count("\n", self.at, error.pos)
                    raise Unreadable(f"not valid JSON ({error.msg})", line) from None
                continue
            except (ValueError, RecursionError) as error:
                raise Unreadable(f"not valid JSON ({reason(error)})", self.line) from None
            if end < len(self.text) or not self._more():  # a number at the end may go on
                self._to(end)
                return value

    def elements(self) -> Iterator[tuple[int, Any]]:
        """(line, value) for each element of the list that begins here."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            self.peek()
            line = self.line
            yield line, self.value()
            if self.take(",]") == "]":
                return

    def members(self) -> Iterator[str]:
        """The keys of the object that begins here, each in front of its value, which the caller takes."""
        self.take("{")
        if self.peek() == "}":
            self.take("}")
            return
        while True:
            if self.peek() != '"':
                raise Unreadable("not valid JSON (expecting a key in double quotes)", self.line)
            key = self.value()
            self.take(":")
            yield key
            if self.take(",}") == "}":
                return

    def end(self) -> None:
        """Raises Unreadable unless nothing follows."""
        if self.peek():
            raise Unreadable("not valid JSON (Extra data)", self.line)

    def _to(self, position: int) -> None:
        self.line += self.text.count("\n", self.at, position)
        self.at = position

    def _more(self) -> bool:
        """Read on, at least as much again as is held, so that a long value is tried a few times only."""
        if self.ended:
            return False
        rest = self.text[self.at :]
        chunk = self.stream.read(max(CHUNK, len(rest)))
        self.ended = not chunk
        self.text, self.at = rest + chunk, 0
        return not self.ended


def reason(error: Exception) -> str:
    """Why a text isn't JSON, without any of it."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number with too many digits"
