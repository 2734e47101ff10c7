"""The part of Go's text/template that our templates use, and what Ollama gives a template.

Stricter than Go where a mistake of ours would hide: a name that isn't known is an error. `tests/real/test_ollama_go.py`
holds this against Go itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ACTION = re.compile(r"\{\{(- )?(.*?)( -)?\}\}", re.DOTALL)
TOKEN = re.compile(r'\s*("(?:\\.|[^"\\])*"|:=|[()=,]|[^\s()=,:"]+)')
FUNCTIONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "not": lambda a: not a,
    "len": len,
    "slice": lambda values, start: values[start:],
}


def collated(messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """(.System, .Messages) as Ollama makes them of a request: neighbours of one role are one message."""
    merged: list[dict[str, Any]] = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"]:
            merged[-1]["content"] += "\n\n" + message["content"]
        else:
            merged.append(dict(message))
    return "\n\n".join(m["content"] for m in messages if m["role"] == "system"), merged


def execute(template: str, messages: Sequence[Mapping[str, Any]], *, think: bool | None = None) -> str:
    """What Ollama sends to the model for these messages."""
    system, merged = collated(messages)
    values = {
        "System": system,
        "Messages": [{"Role": m["role"], "Content": m["content"], "Thinking": m.get("thinking", "")} for m in merged],
        "Think": bool(think),
        "IsThinkSet": think is not None,
    }
    nodes, rest = _parsed([*_pieces(template)])
    assert not rest
    return _Run(values).text(nodes, values)


@dataclass
class _Node:
    """A text, or an action with what it governs: (condition, nodes) of each branch."""

    text: str | None = None
    words: list[str] = field(default_factory=list)
    branches: list[tuple[list[str] | None, list[_Node]]] = field(default_factory=list)


def _pieces(template: str) -> Iterator[str | list[str]]:
    """Texts, and the words of each action; white space beside a trimming action is gone."""
    at, trim = 0, False
    for found in ACTION.finditer(template):
        text = template[at : found.start()]
        text = text.lstrip() if trim else text
        yield text.rstrip() if found[1] else text
        yield TOKEN.findall(found[2])
        at, trim = found.end(), bool(found[3])
    yield template[at:].lstrip() if trim else template[at:]


def _parsed(pieces: list[str | list[str]]) -> tuple[list[_Node], list[str | list[str]]]:
    """The nodes up to an `else` or `end` that isn't theirs, and the pieces from there on."""
    nodes: list[_Node] = []
    while pieces:
        piece = pieces[0]
        if isinstance(piece, str):
            nodes.append(_Node(text=piece))
            pieces = pieces[1:]
        elif piece[0] in ("end", "else"):
            return nodes, pieces
        elif piece[0] in ("if", "range"):
            node, pieces = _block(piece, pieces[1:])
            nodes.append(node)
        else:
            nodes.append(_Node(words=piece))
            pieces = pieces[1:]
    return nodes, []


def _block(head: list[str], pieces: list[str | list[str]]) -> tuple[_Node, list[str | list[str]]]:
    node, condition = _Node(words=head[:1]), list(head[1:])
    while True:
        inside, pieces = _parsed(pieces)
        node.branches.append((condition, inside))
        ending = pieces[0]
        assert isinstance(ending, list)
        if ending == ["end"]:
            return node, pieces[1:]
        assert ending[0] == "else"
        condition = ending[2:] if ending[1:2] == ["if"] else None  # type: ignore[assignment]
        pieces = pieces[1:]


class _Run:
    def __init__(self, root: Any) -> None:
        self.variables: dict[str, Any] = {"$": root}

    def text(self, nodes: list[_Node], dot: Any) -> str:
        return "".join(self.node(node, dot) for node in nodes)

    def node(self, node: _Node, dot: Any) -> str:
        if node.text is not None:
            return node.text
        if node.words == ["if"]:
            for condition, inside in node.branches:
                if condition is None or self.value(condition, dot):
                    return self.text(inside, dot)
            return ""
        if node.words == ["range"]:
            return self.range(node, dot)
        if node.words[1:2] in ([":="], ["="]):
            name = node.words[0]
            assert (node.words[1] == "=") == (name in self.variables) or name == "$last"
            self.variables[name] = self.value(node.words[2:], dot)
            return ""
        value = self.value(node.words, dot)
        assert isinstance(value, str), node.words
        return value

    def range(self, node: _Node, dot: Any) -> str:
        ((words, inside),) = node.branches
        assert words is not None and words[1] == "," and words[3] == ":="
        written = []
        for index, item in enumerate(self.value(words[4:], dot)):
            self.variables |= {words[0]: index, words[2]: item}
            written.append(self.text(inside, item))
        return "".join(written)

    def value(self, words: list[str], dot: Any) -> Any:
        values, rest = self.arguments(words, dot)
        assert not rest, words
        return values

    def arguments(self, words: list[str], dot: Any) -> tuple[Any, list[str]]:
        """The value of a call or of a single operand, up to a closing bracket."""
        name, rest = words[0], words[1:]
        if name not in FUNCTIONS and name not in ("and", "or"):
            return self.operand(words, dot)
        given = []
        while rest and rest[0] != ")":
            value, rest = self.operand(rest, dot)
            given.append(value)
        if name in ("and", "or"):
            stops = next((value for value in given if bool(value) == (name == "or")), given[-1])
            return stops, rest
        return FUNCTIONS[name](*given), rest

    def operand(self, words: list[str], dot: Any) -> tuple[Any, list[str]]:
        word, rest = words[0], words[1:]
        if word == "(":
            value, rest = self.arguments(rest, dot)
            assert rest[0] == ")"
            return value, rest[1:]
        if word.startswith('"'):
            return json.loads(re.sub(r"\\U([0-9a-f]{8})", lambda m: chr(int(m[1], 16)), word)), rest
        if word in ("true", "false"):
            return word == "true", rest
        if word.isdigit():
            return int(word), rest
        start, *names = word.split(".")
        value = self.variables[start] if start else dot
        for name in names:
            value = value[name]
        return value, rest
