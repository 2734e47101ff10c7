"""The text of an answer, split into reasoning, content and calls of tools while it arrives.

What may be the beginning of a mark is held back. So is white space where it would be dropped: around reasoning, and
before a call. All of an answer at once and the same answer character by character give the same parts, joined.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["mark", "reasoning", "content", "call"]


@dataclass(frozen=True)
class Part:
    """A part of the answer. `end` is how many characters of the answer it, and all before it, take.

    A mark has no text. A call has what stands between its marks, and `raw` with the marks.
    """

    kind: Kind
    text: str
    end: int
    raw: str = ""


class Splitter:
    """`think` and `call` are what opens and closes reasoning and calls, None where an answer has none of that.

    `opened`: the prompt has opened reasoning already. An empty start of calls means that an answer which begins with
    `{` is one; an empty end, that a call ends with the answer.
    """

    def __init__(
        self, think: tuple[str, str] | None = None, call: tuple[str, str] | None = None, *, opened: bool = False
    ):
        self._think, self._call = think, call
        self._state = ("opened" if opened else "begin") if think else "answer"
        self._buffer, self._taken = "", 0
        self._thought = self._called = False

    def push(self, text: str) -> list[Part]:
        """The parts that are certain with more text."""
        self._buffer += text
        return list(self._parts(final=False))

    def finish(self) -> list[Part]:
        """What was held back, once the answer has ended."""
        return list(self._parts(final=True))

    def _parts(self, *, final: bool) -> Iterator[Part]:
        steps = {
            "begin": self._begin, "opened": self._begin, "reasoning": self._reasoning, "answer": self._answer,
            "content": self._content, "call": self._in_call,
        }  # fmt: skip
        while True:
            before = self._state
            part = steps[before](final)
            if part is not None:
                yield part
            elif self._state == before:
                return

    def _take(self, count: int, kind: Kind = "mark", text: str = "", raw: str = "") -> Part:
        """Take characters off the buffer as a part; one without text is a mark."""
        self._buffer, self._taken = self._buffer[count:], self._taken + count
        return Part(kind if text else "mark", text, self._taken, raw)

    def _begin(self, final: bool) -> Part | None:
        """Whether the answer begins with reasoning. Some models open what the prompt has opened already."""
        assert self._think
        start, lead = self._think[0], self._buffer.lstrip()
        if lead.startswith(start):
            self._state = "reasoning"
            return self._take(len(self._buffer) - len(lead) + len(start))
        if final or not start.startswith(lead):
            self._state = "reasoning" if self._state == "opened" else "answer"
        return None

    def _reasoning(self, final: bool) -> Part | None:
        assert self._think
        end = self._think[1]
        if not self._thought:
            if lead := len(self._buffer) - len(self._buffer.lstrip()):
                return self._take(lead)
            self._thought = bool(self._buffer)
        place = self._buffer.find(end)
        if place == 0:
            self._thought, self._state = True, "answer"
            return self._take(len(end))
        if place > 0:
            return self._take(place, "reasoning", self._buffer[:place].rstrip())
        if final:
            return self._take(len(self._buffer), "reasoning", self._buffer.rstrip()) if self._buffer else None
        kept = len(self._buffer[: len(self._buffer) - overlap(self._buffer, end)].rstrip())
        return self._take(kept, "reasoning", self._buffer[:kept]) if kept else None

    def _answer(self, final: bool) -> Part | None:
        """The beginning of what follows reasoning, or of an answer without any."""
        lead = self._buffer.lstrip()
        if self._thought and len(lead) < len(self._buffer):
            return self._take(len(self._buffer) - len(lead))
        whole = self._call is not None and not self._call[0]
        if not lead and not final and (whole or self._thought):
            return None
        self._state = "call" if whole and lead.startswith("{") else "content"
        return None

    def _content(self, final: bool) -> Part | None:
        if not self._buffer:
            return None
        if self._call is None or not self._call[0]:
            return self._take(len(self._buffer), "content", self._buffer)
        start = self._call[0]
        place = self._buffer.find(start)
        if place == 0:
            self._state, self._called = "call", True
            return self._take(len(start))
        if place > 0:
            return self._take(place, "content", self._buffer[:place].rstrip())
        if final:
            return self._take(len(self._buffer), "content", self._buffer.rstrip() if self._called else self._buffer)
        kept = len(self._buffer[: len(self._buffer) - overlap(self._buffer, start)].rstrip())
        return self._take(kept, "content", self._buffer[:kept]) if kept else None

    def _in_call(self, final: bool) -> Part | None:
        assert self._call
        start, end = self._call
        place = self._buffer.find(end) if end else -1
        if place < 0 and not final:
            return None
        self._state = "content"
        count = place if place >= 0 else len(self._buffer)
        text, closed = self._buffer[:count], end if place >= 0 else ""
        return self._take(count + len(closed), "call", text or " ", start + text + closed)


def overlap(text: str, mark: str) -> int:
    """How many of the last characters of `text` are the beginning of `mark`, which isn't in it."""
    for count in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:count]):
            return count
    return 0
