"""One training example, whatever format it came from: plain text, or a conversation.

Sources turn rows into examples; `encode` turns examples into tokens. Neither knows the other's format. Messages are
checked here, and brought to one form: content is text, reasoning is `reasoning_content`, arguments of tool calls are
objects.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
SHOWN = 40
# Keys under which reasoning is found, first choice first.
REASONING = ("reasoning_content", "reasoning", "thinking")
# A key of checked messages: the reasoning stood inside the text.
INLINE = "inline_reasoning"
# A block at the beginning; its start may be missing where its end stands alone in a line.
THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*|((?:(?!<think>).)*?)(?:^|\n)</think>[ \t]*(?:\n\s*|$)", re.DOTALL)


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
    checked = tuple(checked_message(message, f"message {index}") for index, message in enumerate(messages, start=1))
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


def tools_of(row: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The tools of a row, where it has any. Raises ValueError unless they are a list of objects."""
    tools = row.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"'tools' is not a list of objects: {shorten(tools)}")
    return tuple(tools)


def shorten(value: Any) -> str:
    """At most the first 40 characters of a value: error messages must not carry private text."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def split_reasoning(text: str) -> tuple[str | None, str]:
    """(reasoning, answer) of a text that may begin with a `<think>` block; the reasoning is None where it has none.

    The start may be missing, as in an answer to a prompt that has opened the block. An empty block is no reasoning.
    """
    if "</think>" not in text or not (match := THOUGHT.match(text)):
        return None, text
    return (match[1] or match[2] or "").strip() or None, text[match.end() :]


def checked_message(message: Any, name: str) -> dict[str, Any]:
    """A message in the one form. Raises ValueError, with its `name`, for what is missing or can't be learned from."""
    if not isinstance(message, dict):
        raise ValueError(f"{name} is {type(message).__name__}, not an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{name} has role {shorten(role)}; known: {', '.join(ROLES)}")
    calls, content = message.get("tool_calls"), _text(message.get("content"), f"{name} ({role})")
    if calls and content is None:
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"{name} ({role}) has content of type {type(content).__name__}, not a string")
    if calls:
        message = {**message, "content": content, "tool_calls": _calls(calls, name)}
    elif content is not message["content"]:
        message = {**message, "content": content}
    if role == "assistant":
        message = _with_reasoning(message, name)
    if not message["content"].strip() and not calls:
        raise ValueError(f"{name} ({role}) is empty")
    return message


def without_images(value: Any) -> Any:
    """A row, or any part of one, without the parts of messages that are images."""
    if isinstance(value, dict):
        return {key: without_images(part) for key, part in value.items()}
    if isinstance(value, list):
        images = [isinstance(part, dict) and "image" in str(part.get("type", "")) for part in value]
        return [without_images(part) for part, image in zip(value, images, strict=True) if not image]
    return value


def as_written(message: dict[str, Any]) -> dict[str, Any]:
    """A checked message as a row of a file has it: reasoning that stood inside the text stands there again."""
    if not message.get(INLINE):
        return message
    others = {key: value for key, value in message.items() if key not in (INLINE, "reasoning_content")}
    thought = message.get("reasoning_content")
    return {**others, "content": f"<think>\n{thought}\n</think>\n\n{message['content']}"} if thought else others


def _text(content: Any, name: str) -> Any:
    """Content as APIs write it, a list of parts, as one text; anything else as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        text = part["text"] if kind in ("text", "input_text") and "text" in part else None
        if not isinstance(text, str):
            hint = " (data.drop=[images] leaves it out)" if "image" in str(kind) else ""
            raise ValueError(f"{name} has a part of type {shorten(kind)}; only text can be trained on here{hint}")
        texts.append(text)
    return "\n".join(texts)


def _with_reasoning(message: dict[str, Any], name: str) -> dict[str, Any]:
    """An assistant message whose reasoning, wherever it stood, is `reasoning_content`."""
    thought = next((message[key] for key in REASONING if message.get(key)), None)
    if thought is not None and not isinstance(thought, str):
        raise ValueError(f"{name} has reasoning of type {type(thought).__name__}, not a string")
    if thought is None:
        thought, content = split_reasoning(message["content"])
        if thought is None and content is message["content"]:
            return message
        message = {**message, "content": content, INLINE: True}
    others = {key: value for key, value in message.items() if key not in REASONING}
    return {**others, "reasoning_content": thought} if thought and thought.strip() else others


def _calls(calls: Any, name: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects: APIs write them as JSON text, chat templates would quote it twice."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"{name} has tool_calls that are not a list of objects: {shorten(calls)}")
    return [{**call, "function": _function(call["function"])} if "function" in call else call for call in calls]


def _function(function: Any) -> Any:
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return function
    try:
        return {**function, "arguments": json.loads(function["arguments"])}
    except (ValueError, RecursionError):
        return function  # text on purpose, or a model's broken call: it stays as it is
