"""`{"conversations": [{"from": "human|gpt|system|tool", "value": …}]}`: ShareGPT exports, or with role and content."""

from __future__ import annotations

from typing import Any

from mlx_lora.data.example import Example, conversation, shorten, tools_of

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "system": "system", "developer": "developer", "tool": "tool", "function_call": "assistant", "observation": "tool",
}  # fmt: skip


def matches(row: dict[str, Any]) -> bool:
    return "conversations" in row


def parse(row: dict[str, Any]) -> Example:
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("'conversations' is not a list of objects with from and value, or role and content")
    messages = []
    if isinstance(row.get("system"), str) and row["system"].strip():
        messages.append({"role": "system", "content": row["system"]})
    for index, turn in enumerate(turns):
        named = "from" if "from" in turn or "role" not in turn else "role"
        speaker = turn.get(named)
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise ValueError(f"turn {index + 1} is from {shorten(speaker)}; known: {', '.join(sorted(ROLES))}")
        said = {"content": turn.get("value")} if named == "from" else turn
        messages.append({**said, "role": ROLES[speaker]})
    return conversation(messages, tools=tools_of(row))
