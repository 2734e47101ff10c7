"""ChatGPT's conversations.json. Of a conversation that was edited or regenerated, only the path that was kept last.

A conversation is a tree of messages: `mapping` has each with its parent, `current_node` is the last one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_lora.config import Data
from mlx_lora.data.readers import decode, json_file
from mlx_lora.data.readers.base import Note, Raw
from mlx_lora.data.readers.chats import Left, Said, conversations

KINDS = ("text", "multimodal_text")
OTHERS = "messages of tools, system and hidden ones"
PICTURES = "pictures and files"
MAPPING = re.compile(r'(?<!\\)"mapping"\s*:\s*\{')


def matches(file: Path) -> bool:
    if not MAPPING.search(decode.head(file)):
        return False
    first = json_file.first(file)
    return isinstance(first, dict) and isinstance(first.get("mapping"), dict)


def rows(file: Path, settings: Data, note: Note) -> Iterator[Raw]:
    left = Left(note)
    for line, row, problem, _ in json_file.rows(file, settings, note):
        if row is None or not isinstance(mapping := row.get("mapping"), dict):
            yield Raw(line, None, problem or "is no conversation: it has no 'mapping'")
            continue
        messages = (_said(line, node.get("message"), left) for node in _path(mapping, row.get("current_node")))
        said = (message for message in messages if message)
        yield from conversations(said, lambda message: message.speaker == "assistant", left)
    left.say()


def _path(mapping: dict[str, Any], current: Any) -> list[dict[str, Any]]:
    """The nodes from the first one to the current one; without that, to the newest that has no children."""
    if not (isinstance(current, str) and current in mapping):
        leaves = [key for key, node in mapping.items() if isinstance(node, dict) and not node.get("children")]
        current = max(leaves, key=lambda key: _created(mapping[key]), default=None)
    path: list[dict[str, Any]] = []
    seen = set()
    while isinstance(current, str) and current not in seen and isinstance(mapping.get(current), dict):
        seen.add(current)
        path.append(mapping[current])
        current = mapping[current].get("parent")
    return path[::-1]


def _created(node: dict[str, Any]) -> float:
    message = node.get("message")
    time = message.get("create_time") if isinstance(message, dict) else None
    return float(time) if isinstance(time, int | float) else 0.0


def _said(line: int, message: Any, left: Left) -> Said | None:
    """What one of the two said; None for what neither did, or nobody saw."""
    if not isinstance(message, dict):
        return None
    author, content, about = (message.get(key) or {} for key in ("author", "content", "metadata"))
    role = author.get("role") if isinstance(author, dict) else None
    parts = content.get("parts") if isinstance(content, dict) else None
    hidden = message.get("weight") == 0 or (
        isinstance(about, dict) and about.get("is_visually_hidden_from_conversation")
    )
    shown = role in ("user", "assistant") and not hidden and message.get("recipient", "all") in ("all", None)
    if not (shown and isinstance(parts, list) and content.get("content_type") in KINDS):
        left.add(OTHERS)
        return None
    left.add(PICTURES, sum(isinstance(part, dict) for part in parts))
    text = "\n".join(part for part in parts if isinstance(part, str)).strip()
    return Said(line, str(role), text) if text else None
