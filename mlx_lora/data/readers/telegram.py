"""Telegram's result.json: one chat, or all of them (`chats.list`). Contacts and sessions in it are never looked at."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from mlx_lora.config import Data
from mlx_lora.data.readers import decode
from mlx_lora.data.readers.base import Note, Raw, Unreadable
from mlx_lora.data.readers.chats import Left, Said, chosen, conversations, listed, several
from mlx_lora.data.readers.json_values import reason

KINDS = (
    "saved_messages|replies|verification_codes|personal_chat|bot_chat|private_group|private_supergroup|public_supergroup"
    "|private_channel|public_channel"
)
CHAT = re.compile(rf'\s*\{{(?=.*(?<!\\)"type"\s*:\s*"(?:{KINDS})").*(?<!\\)"messages"\s*:\s*\[', re.DOTALL)
PROBED = 1 << 20
# Control characters are written \xNN, which isn't JSON; a backslash that is itself escaped begins nothing.
CONTROL = re.compile(r"(?<!\\)((?:\\\\)*)\\x([0-9a-fA-F]{2})")
DELETED = "Deleted Account"
OTHERS = "service messages and media"


def matches(file: Path) -> bool:
    start = decode.head(file, PROBED)
    return start.lstrip("\ufeff \t\r\n").startswith("{") and CHAT.match(start.lstrip("\ufeff")) is not None


def rows(file: Path, settings: Data, note: Note) -> Iterator[Raw]:
    chats = [chat for chat in _chats(_parsed(file, note)) if isinstance(chat, dict)]
    left, people = Left(note), Counter[str]()
    every = [list(_messages(chat)) for chat in chats]
    for said in every:
        people.update(each.speaker for each in said if each.text)
    me = chosen(settings.me, people)
    for said in every:
        talk = [each for each in said if each.text]
        left.add(OTHERS, len(said) - len(talk))
        group = several(Counter(each.speaker for each in talk), me)
        yield from conversations(talk, lambda each: each.speaker == me, left, group=group)
    left.say()


def _parsed(file: Path, note: Note) -> Any:
    text = decode.whole(file, note)
    try:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return json.loads(CONTROL.sub(r"\1\\u00\2", text))
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"not valid JSON ({reason(error)})", getattr(error, "lineno", 0)) from None


def _chats(export: Any) -> list[Any]:
    if "messages" in export:
        return [export]
    lists = (export.get(key) for key in ("chats", "left_chats"))
    return [chat for each in lists if isinstance(each, dict) for chat in listed(each.get("list"))]


def _messages(chat: dict[str, Any]) -> Iterator[Said]:
    """What people wrote, and messages without text for everything else."""
    for number, message in enumerate(listed(chat.get("messages")), start=1):
        if not isinstance(message, dict):
            continue
        text = _text(message.get("text")).strip() if message.get("type") == "message" else ""
        yield Said(number, str(message.get("from") or DELETED), text, _time(message))


def _text(text: Any) -> str:
    """Text is a string, or a list of strings and of objects for what is bold, a link and so on."""
    if isinstance(text, list):
        return "".join(str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in text)
    return text if isinstance(text, str) else ""


def _time(message: dict[str, Any]) -> float | None:
    try:
        return float(message["date_unixtime"])
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    try:
        return datetime.fromisoformat(message["date"]).timestamp()
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
