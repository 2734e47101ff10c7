"""What a chat template leaves out of a conversation: parts that count, and that the rendered text doesn't have.

A part is text, reasoning of the answer that is learned, the name of a speaker, the name and every argument of a tool
call, and the names of the tools. Identifiers don't count, nor does the reasoning of earlier answers: the model won't
see it in a chat either. Parts are looked for in their order, so a short word that occurs elsewhere doesn't stand for
one that is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

Kind = Literal["content", "reasoning_content", "name", "tool_calls", "tools"]


class Part(NamedTuple):
    """A part of message `number` (0 for the tools), in every way that a template may write it."""

    number: int
    kind: Kind
    ways: tuple[str, ...]


def hidden(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], text: str, *, learned: int
) -> list[Part]:
    """The parts that `text` lacks; `learned` is the index of the message whose reasoning counts, -1 for none.

    Some templates put all system messages in front, so parts that aren't in their order may be anywhere, but as often
    as the conversation has them.
    """
    parts = [part for number, m in enumerate(messages) for part in _parts(number, m, reasoning=number == learned)]
    missing = _out_of_order(parts, text)
    if missing:
        rarer = _rarer(parts, text)
        missing = [part for part in missing if part in rarer] or rarer[:1]
    return missing + [part for part in _tools(tools) if _find(text, part.ways, 0)[0] < 0]


def _out_of_order(parts: Sequence[Part], text: str) -> list[Part]:
    """The parts that don't stand behind the one before; arguments of a call may come in any order in their message."""
    missing: list[Part] = []
    number, begin, end = -1, 0, 0
    for part in parts:
        if part.number != number:
            number, begin = part.number, end
        start, stop = _find(text, part.ways, begin if part.kind == "tool_calls" else end)
        if start < 0:
            missing.append(part)
        elif part.kind != "tool_calls":
            end = stop
    return missing


def _rarer(parts: Sequence[Part], text: str) -> list[Part]:
    """The parts that the text has less often than the conversation."""
    rarer = []
    for part in dict.fromkeys(parts):
        way = next((way for way in part.ways if way in text), part.ways[0])
        if text.count(way) < sum(part.ways[0] in other.ways[0] for other in parts):
            rarer.append(part)
    return rarer


def dropped(messages: Sequence[Mapping[str, Any]], drop: Sequence[str]) -> tuple[dict[str, Any], ...]:
    """The messages without the parts in `drop`; one that is left empty goes."""
    kept = [{key: value for key, value in message.items() if key not in drop} for message in messages]
    if "tool_calls" in drop:  # results of calls that nobody made
        kept = [message for message in kept if message["role"] != "tool"]
    return tuple(message for message in kept if message.get("content", "").strip() or message.get("tool_calls"))


def _parts(number: int, message: Mapping[str, Any], *, reasoning: bool) -> Iterator[Part]:
    if message.get("name") and message["role"] != "tool":
        yield Part(number, "name", (str(message["name"]),))
    if reasoning and message.get("reasoning_content"):
        yield Part(number, "reasoning_content", (message["reasoning_content"].strip(),))
    if content := str(message.get("content") or "").strip():
        yield Part(number, "content", _ways(content))
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        if isinstance(function, Mapping):
            yield Part(number, "tool_calls", (str(function.get("name", "")),))
            for leaf in _leaves(function.get("arguments")):
                yield Part(number, "tool_calls", _ways(leaf))


def _tools(tools: Sequence[Mapping[str, Any]]) -> Iterator[Part]:
    for tool in tools:
        function = tool.get("function", tool)
        yield Part(0, "tools", (str(function.get("name", "")) if isinstance(function, Mapping) else "",))


def _leaves(value: Any) -> Iterator[str]:
    """The names and values in an argument, as text."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value.strip()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def _ways(text: str) -> tuple[str, ...]:
    """A text as it stands, and as JSON writes it."""
    if text.isascii() and text.isprintable() and '"' not in text and "\\" not in text:
        return (text,)
    escaped = (json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
    return tuple(dict.fromkeys((text, *escaped)))


def _find(text: str, ways: Sequence[str], start: int) -> tuple[int, int]:
    """(first, one past the last) of the way that is found first, or (-1, -1)."""
    found = [(place, place + len(way)) for way in ways if (place := text.find(way, start)) >= 0]
    return min(found, default=(-1, -1))
