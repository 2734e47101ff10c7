"""One training example, whatever format it came from: plain text, or a conversation.

Sources turn rows into examples; `encode` turns examples into tokens. Neither knows the other's format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
SHOWN = 40


@dataclass(frozen=True)
class Example:
    """`text` alone, or `messages` with the number of them that are prompt.

    `plain` is the same exchange without a chat template, (prompt, completion), for formats that have such a form.
    `mask` is what the format learns when the recipe says auto.
    """

    text: str | None = None
    messages: tuple[dict[str, Any], ...] = ()
    prompt_messages: int = 0
    plain: tuple[str, str] | None = None
    tools: tuple[dict[str, Any], ...] = ()
    mask: str = "assistant"


def conversation(messages: list[Any], *, prompt: int | None = None, **more: Any) -> Example:
    """An Example from a list of messages; `prompt` counts the leading ones that are given, not learned.

    Without `prompt`, everything before the last assistant message is. Raises ValueError naming the faulty message.
    """
    checked = tuple(_checked(message, index) for index, message in enumerate(messages))
    assistants = [index for index, message in enumerate(checked) if message["role"] == "assistant"]
    if not assistants:
        raise ValueError("no assistant message, nothing to learn")
    return Example(messages=checked, prompt_messages=assistants[-1] if prompt is None else prompt, **more)


def string(row: dict[str, Any], key: str, *, optional: bool = False) -> str:
    """The string at `key`. Raises ValueError when it is missing, empty or something else."""
    value = row.get(key)
    if optional and value in (None, ""):
        return ""
    if key not in row:
        raise ValueError(f"no key {key!r}")
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is {type(value).__name__}, not a string: {shorten(value)}")
    if not value.strip():
        raise ValueError(f"{key!r} is empty")
    return value


def shorten(value: Any) -> str:
    """At most the first 40 characters of a value: error messages must not carry private text."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _checked(message: Any, index: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"message {index + 1} is {type(message).__name__}, not an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"message {index + 1} has role {shorten(role)}; known: {', '.join(ROLES)}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return {**message, "content": ""}
    if not isinstance(content, str):
        raise ValueError(f"message {index + 1} ({role}) has content of type {type(content).__name__}, not a string")
    if not content.strip() and not message.get("tool_calls"):
        raise ValueError(f"message {index + 1} ({role}) is empty")
    return message
