"""A system message in front of an example that has none."""

from __future__ import annotations

from dataclasses import replace

from mlx_lora.data.example import Example


def with_system(example: Example, system: str) -> Example:
    """The example with a system message, also in its plain form; as it is where it has one, or is plain text."""
    if not example.messages or any(message["role"] in ("system", "developer") for message in example.messages):
        return example
    plain = example.plain and (f"{system}\n\n{example.plain[0]}", example.plain[1])
    messages = ({"role": "system", "content": system}, *example.messages)
    return replace(example, messages=messages, prompt_messages=example.prompt_messages + 1, plain=plain)
