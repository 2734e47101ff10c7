"""WhatsApp's exported chats, `_chat.txt` on iOS and `WhatsApp Chat with ….txt` on Android.

    [31.12.24, 23:58:01] Ana: happy new year        iOS
    12/31/24, 11:58 PM - Ana: happy new year        Android

The order of day and month follows from the phone's language: it is found by numbers above 12, else by which order
makes the messages follow each other in time. A line without a date continues the message above it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from mlx_lora.config import Data
from mlx_lora.data.readers import decode
from mlx_lora.data.readers.base import Note, Raw
from mlx_lora.data.readers.chats import Left, Said, chosen, conversations, several

MARKS = "\u200e\u200f\u202a\u202b\u202c\ufeff"
DATE = r"(\d{1,4})[./-] ?(\d{1,2})[./-] ?(\d{1,4})\.?"
TIME = r"(\d{1,2})[:.](\d{2})(?:[:.](\d{2}))?(?: ?([AaPp])\.? ?[Mm]\.?)?"
HEADER = re.compile(rf"\[{DATE},? {TIME}\] ?(.*)|{DATE},? {TIME} - (.*)", re.DOTALL)
# A date and a time of the phone's own hold other kinds of spaces.
SPACES = str.maketrans({"\u202f": " ", "\u00a0": " "})
LONGEST_HEADER = 40
# What stands for a picture, a call or a deleted message: the app's own words begin with a mark, or are in brackets.
PLACEHOLDER = re.compile(r"[\u200e\u200f].*|<[^<>]{3,60}>|null|\S+\.\w{2,4} \([^()]{3,40}\)", re.DOTALL)
EDITED = re.compile(r"\s*\u200e<[^<>]{3,60}>$|\s*<This message was edited>$")
SYSTEM = "system lines and media"
PROBED = 50


class Line(NamedTuple):
    """One message, or one of the app's own lines (no speaker). `numbers` are date and time as they are written."""

    number: int
    numbers: tuple[str, ...]
    speaker: str | None
    text: str


@dataclass
class Survey:
    """What a first pass over a chat finds."""

    counts: Counter[str] = field(default_factory=Counter)
    day_first: int = 0
    month_first: int = 0
    either: int = 0
    # For both orders of day and month: the last time, and how often time went back.
    last: dict[bool, float] = field(default_factory=dict)
    back: Counter[bool] = field(default_factory=Counter)

    def add(self, line: Line) -> None:
        if line.speaker is not None and not PLACEHOLDER.fullmatch(line.text):
            self.counts[line.speaker] += 1
        first, second, *_ = line.numbers
        self.day_first += len(first) <= 2 and int(first) > 12
        self.month_first += len(first) <= 2 and int(second) > 12
        self.either += len(first) <= 2 and int(first) != int(second)
        for order in (True, False):
            if (time := seconds(line.numbers, order)) is not None:
                self.back[order] += time < self.last.get(order, 0)
                self.last[order] = time

    @property
    def is_day_first(self) -> bool:
        if self.day_first or self.month_first:
            return self.day_first >= self.month_first
        return self.back[True] <= self.back[False]

    @property
    def is_unsure(self) -> bool:
        """Whether nothing tells the order of day and month."""
        return bool(self.either and not (self.day_first or self.month_first) and self.back[True] == self.back[False])


def matches(file: Path) -> bool:
    """Whether a text begins like a chat: a header on its first line, and on another one."""
    lines = islice((line for line in decode.head(file).splitlines() if line.strip()), PROBED)
    headers = [_header(line) is not None for line in lines]
    return headers[:1] == [True] and sum(headers) > 1


def rows(file: Path, settings: Data, note: Note) -> Iterator[Raw]:
    survey, left = Survey(), Left(note)
    for line in _lines(file, settings.me, note):
        survey.add(line)
    me = chosen(settings.me, survey.counts)
    if survey.is_unsure:
        note("dates are read as day, month, year; nothing in the file tells their order")
    messages = _messages(file, settings.me, survey.is_day_first, note, left)
    yield from conversations(messages, lambda said: said.speaker == me, left, group=several(survey.counts, me))
    left.say()


def _messages(file: Path, me: str | None, day_first: bool, note: Note, left: Left) -> Iterator[Said]:
    for line in _lines(file, me, note):
        text = EDITED.sub("", line.text).strip()
        if line.speaker is None or PLACEHOLDER.fullmatch(line.text) or not text:
            left.add(SYSTEM)
            continue
        yield Said(line.number, line.speaker, text, seconds(line.numbers, day_first))


def _lines(file: Path, me: str | None, note: Note) -> Iterator[Line]:
    """Messages with the lines that continue them."""
    current: Line | None = None
    for number, text in decode.lines(file, note):
        text = text.rstrip("\r\n")
        header = _header(text)
        if header is None:
            if current is not None:
                current = current._replace(text=f"{current.text}\n{text}")
            continue
        if current is not None:
            yield current._replace(text=current.text.rstrip())
        numbers, rest = header
        own = me is not None and rest.startswith(f"{me}: ")  # a name may hold ": " itself
        speaker, colon, said = (me or "", ": ", rest[len(me or "") + 2 :]) if own else rest.partition(": ")
        named = bool(colon) and bool(speaker.strip(MARKS))
        current = Line(number, numbers, speaker.strip(MARKS) if named else None, said if named else rest)
    if current is not None:
        yield current._replace(text=current.text.rstrip())


def _header(line: str) -> tuple[tuple[str, ...], str] | None:
    """(numbers of date and time, what follows), None for a line without a date."""
    line = line.lstrip(MARKS)
    found = HEADER.fullmatch(line[:LONGEST_HEADER].translate(SPACES) + line[LONGEST_HEADER:])
    if not found:
        return None
    groups = found.groups()
    *numbers, rest = groups[:8] if groups[7] is not None else groups[8:]
    # what follows may begin inside the first characters, whose spaces were replaced for the date alone
    return tuple(number or "" for number in numbers), line[len(line) - len(rest) :]


def seconds(numbers: tuple[str, ...], day_first: bool) -> float | None:
    """The time of a message in seconds; None where there is no such date."""
    first, second, third, hour, minute, second_of_minute, half = numbers
    year, month, day = (first, second, third) if len(first) == 4 else (third, second, first)
    if len(first) != 4 and not day_first:
        month, day = day, month
    hours = int(hour) % 12 + 12 * (half.lower() == "p") if half else int(hour)
    try:
        years = int(year) + (2000 if int(year) < 100 else 0)
        moment = datetime(years, int(month), int(day), hours, int(minute), int(second_of_minute or 0))
    except ValueError:
        return None
    return (moment - datetime(1970, 1, 1)).total_seconds()
