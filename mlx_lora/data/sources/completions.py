"""`{"prompt": …, "completion": …, "system"?}`: two strings, or two lists of messages."""

from __future__ import annotations

from typing import Any

from mlx_lora.data.example import Example, conversation, string, tools_of
from mlx_lora.data.system import with_system


def matches(row: dict[str, Any]) -> bool:
    return "prompt" in row and "completion" in row


def parse(row: dict[str, Any]) -> Example:
    system = string(row, "system", optional=True)
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        whole = conversation(
            row["prompt"] + row["completion"], prompt=len(row["prompt"]), tools=tools_of(row), mask="completion"
        )
        if not any(message["role"] == "assistant" for message in whole.messages[whole.prompt_messages :]):
            raise ValueError("'completion' has no assistant message, nothing to learn")
        return with_system(whole, system) if system else whole
    prompt, completion = string(row, "prompt"), string(row, "completion")
    exchange = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    whole = conversation(exchange, plain=(prompt, completion), mask="completion")
    return with_system(whole, system) if system else whole
