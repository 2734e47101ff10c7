"""`{"prompt": …, "completion": …}`: two strings, or two lists of messages."""

from __future__ import annotations

from typing import Any

from mlx_lora.data.example import Example, conversation, string, tools_of


def matches(row: dict[str, Any]) -> bool:
    return "prompt" in row and "completion" in row


def parse(row: dict[str, Any]) -> Example:
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        whole = conversation(
            row["prompt"] + row["completion"], prompt=len(row["prompt"]), tools=tools_of(row), mask="completion"
        )
        if not any(message["role"] == "assistant" for message in whole.messages[whole.prompt_messages :]):
            raise ValueError("'completion' has no assistant message, nothing to learn")
        return whole
    prompt, completion = string(row, "prompt"), string(row, "completion")
    exchange = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return conversation(exchange, plain=(prompt, completion), mask="completion")
