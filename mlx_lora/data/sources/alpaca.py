"""`{"instruction": …, "input"?, "output": …, "system"?, "history"?}`: instruction tuning as Alpaca wrote it."""

from __future__ import annotations

from typing import Any

from mlx_lora.data.example import Example, conversation, string


def matches(row: dict[str, Any]) -> bool:
    return "instruction" in row and "output" in row


def parse(row: dict[str, Any]) -> Example:
    instruction, output = string(row, "instruction"), string(row, "output")
    given, system = string(row, "input", optional=True), string(row, "system", optional=True)
    question = f"{instruction}\n\n{given}" if given else instruction
    messages = [{"role": "system", "content": system}] if system else []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise ValueError("'history' is not a list of [question, answer] pairs")
    for turn in history:
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    plain = None if history else ("\n\n".join(filter(None, (system, question))) + "\n\n", output)
    return conversation(messages, plain=plain, mask="completion")
