""".mbox and .eml: a conversation for each thread. A first pass reads headers, a second one the texts of a thread.

Threads follow from References and In-Reply-To, and from the subject where a reply has neither.
"""

from __future__ import annotations

import mailbox
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from mlx_lora.config import Data
from mlx_lora.data.readers.base import Note, Raw, Unreadable
from mlx_lora.data.readers.chats import Left, Said, chosen, conversations
from mlx_lora.data.readers.letters import Letter

EMPTY = "mails without words of their own"


@dataclass
class Entry:
    """Where a mail is, who wrote it and when; its thread is the index of another mail, or its own."""

    number: int
    file: Path
    content: Callable[[], bytes]
    address: str = ""
    name: str = ""
    time: float = 0.0


def rows(file: Path, settings: Data, note: Note) -> Iterator[Raw]:
    if file.suffix.lower() == ".eml":
        yield from of_entries([Entry(1, file, file.read_bytes)], settings, note)
        return
    with open(file, "rb") as stream:
        if (start := stream.read(5)) and start != b"From ":
            raise Unreadable("is not a mailbox: it doesn't begin with a line 'From …'")
    with closing(mailbox.mbox(file, create=False)) as box:
        entries = [
            Entry(number, file, lambda key=key: box.get_bytes(key))  # type: ignore[misc]
            for number, key in enumerate(box.iterkeys(), start=1)
        ]
        if entries:
            yield from of_entries(entries, settings, note)


def of_files(files: Sequence[Path], settings: Data, note: Note) -> Iterator[Raw]:
    """The mails of several .eml files together, so that threads are found."""
    yield from of_entries([Entry(1, file, file.read_bytes) for file in files], settings, note)


def of_entries(entries: list[Entry], settings: Data, note: Note) -> Iterator[Raw]:
    threads = _threads(entries)
    counts = Counter(entry.address for entry in entries)
    me = _me(settings.me, entries, counts)
    left = Left(note)
    for thread in threads:
        yield from _rows(thread, me, left)
    left.say()


def _rows(thread: list[Entry], me: Callable[[Entry], bool], left: Left) -> Iterator[Raw]:
    own = {(entry.file, entry.number) for entry in thread if me(entry)}
    people = {entry.address for entry in thread if not me(entry)}
    if own and people:  # else no text is read
        said = _said(thread, left)
        yield from conversations(said, lambda each: (each.file, each.line) in own, left, group=len(people) > 1)


def _said(thread: list[Entry], left: Left) -> Iterator[Said]:
    for entry in thread:
        text = Letter(entry.content()).text
        if text:
            yield Said(entry.number, entry.name, text, None, entry.file)
        else:
            left.add(EMPTY)


def _me(me: str | None, entries: list[Entry], counts: Counter[str]) -> Callable[[Entry], bool]:
    """Whether a mail is mine: `data.me` is an address, or a name as it stands in front of one."""
    wanted = (me or "").strip().casefold()
    if me is None or not any(wanted in (entry.address, entry.name.casefold()) for entry in entries):
        chosen(me, counts)
    return lambda entry: wanted in (entry.address, entry.name.casefold())


def _threads(entries: list[Entry]) -> list[list[Entry]]:
    """Mails by thread, both in order of time. Fills in who wrote them and when."""
    parents: dict[str, str] = {}

    def root(key: str) -> str:
        while parents.setdefault(key, key) != key:
            parents[key] = parents[parents[key]]
            key = parents[key]
        return key

    subjects: dict[str, str] = {}
    keys = []
    for index, entry in enumerate(entries):
        letter = Letter(entry.content())
        entry.address, entry.name, entry.time = letter.address, letter.name, letter.time
        key = letter.own_id or f"mail {index}"
        keys.append(key)
        references, (subject, is_reply) = letter.references, letter.subject
        for reference in references:
            parents[root(reference)] = root(key)
        if subject and is_reply and not references and subject in subjects:
            parents[root(subjects[subject])] = root(key)
        if subject:
            subjects.setdefault(subject, key)
    threads: dict[str, list[Entry]] = {}
    for key, entry in sorted(zip(keys, entries, strict=True), key=lambda pair: pair[1].time):
        threads.setdefault(root(key), []).append(entry)
    return list(threads.values())
