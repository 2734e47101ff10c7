"""`{"messages": [{"role", "content", "tool_calls"?}], "tools"?, "system"?}`: conversations as chat APIs write them."""

from __future__ import annotations

from typing import Any

from mlx_lora.data.example import Example, conversation, string, tools_of
from mlx_lora.data.system import with_system


def matches(row: dict[str, Any]) -> bool:
    return "messages" in row


def parse(row: dict[str, Any]) -> Example:
    if not isinstance(row["messages"], list):
        raise ValueError("'messages' is not a list")
    whole = conversation(row["messages"], tools=tools_of(row))
    system = string(row, "system", optional=True)
    return with_system(whole, system) if system else whole
