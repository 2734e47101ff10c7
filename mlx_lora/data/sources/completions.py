"""`{"prompt": …, "completion": …}`: two strings, or two lists of messages."""

from __future__ import annotations

from typing import Any

from mlx_lora.data.example import Example, conversation, string


def matches(row: dict[str, Any]) -> bool:
    return "prompt" in row and "completion" in row


def parse(row: dict[str, Any]) -> Example:
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        whole, tools = row["prompt"] + row["completion"], tuple(row.get("tools") or ())
        return conversation(whole, prompt=len(row["prompt"]), tools=tools, mask="completion")
    prompt, completion = string(row, "prompt"), string(row, "completion")
    exchange = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return conversation(exchange, plain=(prompt, completion), mask="completion")
