"""Personal data in a text, by kind: e-mail addresses, phone numbers, payment cards, IBANs, and secret keys.

Patterns and checksums only: names, addresses and dates of birth are not found, and what is found may be harmless.
Everything runs behind checks that cost a few nanoseconds a character, because most texts hold nothing of the kind.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from mlx_lora.data import account_numbers, phone_numbers, secret_keys
from mlx_lora.data.phone_numbers import RUN

# Taken places are overwritten with a character that is part of no pattern.
TAKEN = "\x00"
# Keys of a message that say what it is, not what somebody wrote.
STRUCTURE = ("role", "type", "id", "tool_call_id", "name")

LOCAL = re.compile(r"[^\W_](?:[\w.+%'-]{0,62}[\w+%-])?\Z")
LABEL = r"[^\W_](?:[\w-]{0,61}[^\W_])?"
DOMAIN = re.compile(rf"(?:{LABEL}\.){{1,8}}(xn--[a-z0-9-]{{2,59}}|[^\W\d_]{{2,24}})(?![\w(\[])(?!\.[\w])")
# Endings of two letters are countries' and all accepted. Of the longer ones these are: in code, `x@self.weight` is a
# product. An ending that isn't ASCII is a domain's.
ENDINGS = frozenset(
    "academy agency app arpa art asia bank bayern berlin biz blog business cafe care careers cat center chat church "
    "city cloud club coach codes com community company consulting coop design dev digital direct earth edu education "
    "email energy engineering estate events example expert family farm finance fit foundation fund gallery games "
    "global gmbh gov group guide hamburg health help host hotel house inc info institute int international invalid "
    "jobs koeln land law legal life link live local london ltd management market marketing media mil mobi money "
    "museum name net network news ngo online org page partners party photo photography photos plus post press pro "
    "productions property pub report restaurant rocks run sale school science services shop site social software "
    "solutions space store studio style support swiss systems team tech technology tel test tips today tools top "
    "tours town trade training travel university vet video vip vision wang wien wiki work works world wtf xyz yoga "
    "zone".split()
)
# Two letters that end the names of files: `icon@2x.js` is none's address.
FILES = frozenset(("js", "ts", "gz", "7z"))
SHOWN_SCALE = re.compile(r"[1-9]x\.")


class Span(NamedTuple):
    """A place in a text: `text[start:end]` is of that kind."""

    kind: str
    start: int
    end: int


def find(text: str) -> list[Span]:
    """Every place of every kind, in order, none overlapping another."""
    found: list[Span] = []
    for kind, finder in FINDERS.items():
        if kind == "iban" and not RUN.search(text):
            break  # this kind and those below it have seven digits in a row
        if spans := list(finder(text)):
            found += [Span(kind, start, end) for start, end in spans]
            text = _replaced(text, spans, [TAKEN * (end - start) for start, end in spans])
    return sorted(found, key=lambda span: span.start)


def redact(text: str) -> str:
    """`text` with `[email]`, `[phone]`, `[card]`, `[iban]` or `[key]` in each place found."""
    spans = find(text)
    return _replaced(text, [span[1:] for span in spans], [f"[{span.kind}]" for span in spans]) if spans else text


def count(texts: Iterable[str]) -> Counter[str]:
    """How many of each kind are in the texts; only kinds that there are."""
    return Counter(span.kind for text in texts for span in find(text))


def texts_of(value: Any) -> Iterator[str]:
    """What people and models wrote in a message or in several: contents, reasoning, arguments of tool calls."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in STRUCTURE or not isinstance(item, str):
                yield from texts_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_of(item)


def redacted(value: Any) -> Any:
    """The same for every text of a message or of several: a copy with `redact` applied."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {
            key: item if key in STRUCTURE and isinstance(item, str) else redacted(item) for key, item in value.items()
        }
    return [redacted(item) for item in value] if isinstance(value, list | tuple) else value


def emails(text: str) -> Iterator[tuple[int, int]]:
    """E-mail addresses, from each `@` to both sides."""
    at = text.find("@")
    while at >= 0:
        # a regular expression that began with the part before the `@` would try every word of the text
        left = LOCAL.search(text, max(0, at - 64), at) if at else None
        right = DOMAIN.match(text, at + 1) if left else None
        if left and right and _is_address(text, left, right):
            yield left.start(), right.end()
            at = right.end() - 1
        at = text.find("@", at + 1)


def _is_address(text: str, left: re.Match[str], right: re.Match[str]) -> bool:
    ending = right[1]
    known = ending.lower() in ENDINGS or not ending.isascii() or ending.startswith("xn--")
    if not known and not (len(ending) == 2 and (ending.islower() or ending.isupper()) and ending not in FILES):
        return False
    if ".." in left[0] or SHOWN_SCALE.match(right[0]):
        return False
    before = text[max(0, left.start() - 3) : left.start()]
    # ssh://git@host/path and git@host:owner/repository name a machine, not a person
    address_of_machine = before == "://" or (left[0] == "git" and text[right.end() : right.end() + 1] in (":", "/"))
    return not address_of_machine and before[-1:] not in ("/", "@")


def _replaced(text: str, spans: Iterable[tuple[int, int]], replacements: list[str]) -> str:
    parts, done = [], 0
    for (start, end), replacement in zip(spans, replacements, strict=True):
        parts += [text[done:start], replacement]
        done = end
    return "".join([*parts, text[done:]])


# What a match of a kind may hold is not looked at again by the kinds below it: a token has digits, an IBAN too.
FINDERS: dict[str, Callable[[str], Iterator[tuple[int, int]]]] = {
    "key": secret_keys.find,
    "email": emails,
    "iban": account_numbers.ibans,
    "card": account_numbers.cards,
    "phone": phone_numbers.find,
}
