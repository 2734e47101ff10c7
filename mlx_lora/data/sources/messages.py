"""`{"messages": [{"role", "content", "tool_calls"?}], "tools"?}`: conversations as chat APIs write them."""

from __future__ import annotations

from typing import Any

from mlx_lora.data.example import Example, conversation, tools_of


def matches(row: dict[str, Any]) -> bool:
    return "messages" in row


def parse(row: dict[str, Any]) -> Example:
    if not isinstance(row["messages"], list):
        raise ValueError("'messages' is not a list")
    return conversation(row["messages"], tools=tools_of(row))
