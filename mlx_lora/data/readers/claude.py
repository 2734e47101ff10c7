"""Claude's conversations.json: a list of conversations, each with its chat_messages; newer ones are trees of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_lora.config import Data
from mlx_lora.data.readers import decode, json_file
from mlx_lora.data.readers.base import Note, Raw
from mlx_lora.data.readers.chats import Left, Said, conversations, listed

MESSAGES = re.compile(r'(?<!\\)"chat_messages"\s*:\s*\[')


def matches(file: Path) -> bool:
    if not MESSAGES.search(decode.head(file)):
        return False
    first = json_file.first(file)
    return isinstance(first, dict) and isinstance(first.get("chat_messages"), list)


def rows(file: Path, settings: Data, note: Note) -> Iterator[Raw]:
    left = Left(note)
    for line, row, problem, _ in json_file.rows(file, settings, note):
        if row is None or not isinstance(messages := row.get("chat_messages"), list):
            yield Raw(line, None, problem or "is no conversation: it has no 'chat_messages'")
            continue
        said = (_said(line, message, left) for message in _path(messages, row.get("current_leaf_message_uuid")))
        yield from conversations((each for each in said if each), lambda each: each.speaker == "assistant", left)
    left.say()


def _path(messages: list[Any], leaf: Any) -> list[dict[str, Any]]:
    """All messages in order; of a tree, those from the first one to the leaf that was kept last."""
    found = [message for message in messages if isinstance(message, dict)]
    by_id = {str(message.get("uuid")): message for message in found}
    if not isinstance(leaf, str) or leaf not in by_id:
        return found
    path: list[dict[str, Any]] = []
    current: Any = leaf
    while isinstance(current, str) and current in by_id:
        path.append(by_id.pop(current))
        current = path[-1].get("parent_message_uuid")
    return path[::-1]


def _said(line: int, message: dict[str, Any], left: Left) -> Said | None:
    blocks = message.get("content")
    texts = (
        [block.get("text") for block in blocks if isinstance(block, dict) and block.get("type") == "text"]
        if (isinstance(blocks, list))
        else []
    )
    text = "\n".join(text for text in texts if isinstance(text, str)).strip() or str(message.get("text") or "").strip()
    attached = [*listed(message.get("attachments")), *listed(message.get("files"))]
    left.add("attachments", len(attached))
    speaker = {"human": "user", "assistant": "assistant"}.get(str(message.get("sender")))
    return Said(line, speaker, text) if speaker and text else None
