"""Ollama's own rules for a Modelfile, as its parser and its documentation have them; none of our writer's code.

An instruction is a word, in any case, a blank, and a value. A value ends at a white space where what was read so far is
whole: at once where it isn't quoted and a line ends, else behind its closing quotation mark, one or three as it began.
Characters that can't be printed are dropped.
"""

from __future__ import annotations

INSTRUCTIONS = {
    "from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter", "message",
    "requires",
}  # fmt: skip


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """(instruction in lower case, value) in order; a parameter's value begins with its name. ValueError for others."""
    found: list[tuple[str, str]] = []
    at = 0
    while at < len(text):
        if text[at] in " \t\r\n":
            at += 1
        elif text[at] == "#":
            at = _line_end(text, at)
        else:
            name, at = _word(text, at)
            if name.lower() not in INSTRUCTIONS:
                raise ValueError(f"{name!r} is no instruction")
            prefix = ""
            if name.lower() in ("parameter", "message"):
                prefix, at = _word(text, at)
                if name.lower() == "message" and prefix not in ("system", "user", "assistant"):
                    raise ValueError(f"{prefix!r} is no role")
            value, at = _value(text, at)
            found.append((name.lower(), f"{prefix} {value}" if prefix else value))
    if not any(name == "from" for name, _ in found):
        raise ValueError("no FROM line")
    return found


def _line_end(text: str, at: int) -> int:
    return next((index for index in range(at, len(text)) if text[index] in "\r\n"), len(text))


def _word(text: str, at: int) -> tuple[str, int]:
    end = at
    while end < len(text) and (text[end].isascii() and text[end].isalnum() or text[end] == "_"):
        end += 1
    if end == at or end >= len(text) or text[end] not in " \t":
        raise ValueError(f"a word and a blank are expected at {text[at : at + 20]!r}")
    return text[at:end], end + 1


def _value(text: str, at: int) -> tuple[str, int]:
    kept = ""
    for index in range(at, len(text)):
        character = text[index]
        if character in "\r\n":
            value = unquoted(kept.strip())
            if value is not None:
                return value, index + 1
        if character.isprintable() or character in "\r\n\t":
            kept += character
    value = unquoted(kept.strip())
    if value is None:
        raise ValueError("it ends inside a value")
    return value, len(text)


def unquoted(value: str) -> str | None:
    """The value without its quotation marks; None where it isn't closed yet."""
    for mark in ('"""', '"'):
        if value.startswith(mark):
            closed = len(value) >= 2 * len(mark) and value.endswith(mark)
            return value[len(mark) : -len(mark)] if closed else None
    return value
