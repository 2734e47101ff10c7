"""Messages of people become conversations: mine are the answers, everybody else's are the questions.

    Ana  10:01  are you coming?     user       are you coming?\\n(we start at 8)
    Ana  10:02  (we start at 8)
    me   10:09  on my way           assistant  on my way
    …    18:30                      more than GAP later: another conversation

What answers nothing, and what nobody answers, teaches nothing: it is left out and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlx_lora.data.readers.base import Note, Raw, Unreadable
from mlx_lora.errors import nearest

GAP = 6 * 3600  # seconds of silence after which another conversation begins
MOST_NAMES, LONGEST_NAME = 20, 40
UNANSWERED, ANSWERS_NOTHING = "messages that nobody answers", "of your own messages that answer nothing"


class Said(NamedTuple):
    """One message; `time` in seconds, None where messages belong together however long they are apart."""

    line: int
    speaker: str
    text: str
    time: float | None = None
    file: Path | None = None


class Left:
    """Counts of what is left out, for a note at the end."""

    def __init__(self, note: Note):
        self.note, self.counts = note, Counter[str]()

    def add(self, what: str, count: int = 1) -> None:
        self.counts[what] += count

    def say(self) -> None:
        for what, count in self.counts.items():
            if count:
                self.note(f"{count} {what} left out")


def chosen(me: str | None, counts: Mapping[str, int]) -> str:
    """The name among the speakers that `data.me` means, by any case. Raises Unreadable listing the names."""
    names = sorted(counts, key=lambda name: (-counts[name], name))
    listed = ", ".join(f"{name[:LONGEST_NAME]} ({counts[name]})" for name in names[:MOST_NAMES])
    listed += f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    if not names:
        raise Unreadable("holds no messages of people")
    if me is None:
        raise Unreadable(f"is a chat, so data.me=NAME has to say whose messages are the answers: {listed}")
    same = [name for name in names if name.casefold() == me.strip().casefold()]
    if not same:
        close = nearest(me, names[:MOST_NAMES]) if len(names) > 1 else ""
        close = close if "did you mean" in close else ""
        raise Unreadable(f"has no messages of data.me={me[:LONGEST_NAME]}{close}; there are: {listed}")
    return me.strip() if me.strip() in same else same[0]


def conversations(
    messages: Iterable[Said], mine: Callable[[Said], bool], left: Left, *, group: bool = False
) -> Iterator[Raw]:
    """A row for each conversation that holds a question and my answer; in a group, questions begin with a name."""
    for talk in _parted(messages):
        turns: list[tuple[Said, bool, str]] = []
        for said in talk:
            own = mine(said)
            text = said.text if own or not group else f"{said.speaker}: {said.text}"
            if turns and turns[-1][1] == own:
                turns[-1] = (turns[-1][0], own, f"{turns[-1][2]}\n{text}")
            else:
                turns.append((said, own, text))
        if turns and turns[0][1]:
            left.add(ANSWERS_NOTHING, _count(talk, mine, first=True))
            turns = turns[1:]
        if turns and not turns[-1][1]:
            left.add(UNANSWERED, _count(talk[::-1], mine, first=False))
            turns = turns[:-1]
        if turns:
            rows = [message("assistant" if own else "user", text) for _, own, text in turns]
            yield Raw(turns[0][0].line, {"messages": rows}, None, turns[0][0].file)


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def listed(value: Any) -> list[Any]:
    """A value that should be a list, as one."""
    return value if isinstance(value, list) else []


def several(counts: Mapping[str, int], me: str) -> bool:
    """Whether more than one other person takes part."""
    return len(set(counts) - {me}) > 1


def _parted(messages: Iterable[Said]) -> Iterator[list[Said]]:
    talk: list[Said] = []
    for said in messages:
        if talk and said.time is not None and talk[-1].time is not None and said.time - talk[-1].time > GAP:
            yield talk
            talk = []
        talk.append(said)
    if talk:
        yield talk


def _count(talk: list[Said], mine: Callable[[Said], bool], *, first: bool) -> int:
    """How many messages at the beginning are mine (`first`), or not mine."""
    return next((index for index, said in enumerate(talk) if mine(said) != first), len(talk))
