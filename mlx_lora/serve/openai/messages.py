"""The messages of a request, in the one form that training rows have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_lora.data.example import REASONING, ROLES, checked_message
from mlx_lora.serve.answer import NO_SYSTEM
from mlx_lora.serve.conversation import Message, Trained
from mlx_lora.serve.openai.errors import refused

KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", *REASONING)
# Of answers that a client sends back; they say nothing to a model.
LEFT_OUT = ("refusal", "annotations", "audio", "id")


def prompt_messages(messages: Sequence[Mapping[str, Any]], trained: Trained, *, developer: bool) -> list[Message]:
    """The messages that the prompt is made of, with the adapter's own system line where the request has none.

    `developer`: whether the template knows that role, which stands for system elsewhere. Raises ApiError.
    """
    checked = [_checked(message, index, developer) for index, message in enumerate(messages)]
    if not any(message["role"] in ("system", "developer") for message in checked):
        return trained.with_system(checked)
    if trained.template == "none":
        raise refused("messages", f"the model was trained without a chat template: {NO_SYSTEM}")
    return checked


def _checked(message: Mapping[str, Any], index: int, developer: bool) -> Message:
    place = f"messages.{index}"
    kept = {key: value for key, value in message.items() if value is not None and key not in LEFT_OUT}
    if unknown := [key for key in kept if key not in KEYS]:
        raise refused(f"{place}.{unknown[0][:64]}", f"message {index} has an unknown field {unknown[0][:64]!r}")
    if kept.get("role") not in ROLES:
        raise refused(f"{place}.role", f"message {index} has no role of {', '.join(ROLES)}")
    if kept["role"] == "developer" and not developer:
        kept["role"] = "system"
    content = kept.get("content")
    empty = content in (None, []) or isinstance(content, str) and not content.strip()
    nothing = empty and kept["role"] != "assistant"  # a tool may have nothing to say
    try:
        checked = checked_message({**kept, "content": "nothing"} if nothing else kept, f"message {index}")
    except ValueError as error:
        said = str(error).partition(" (data.drop=")[0]  # a setting of training
        raise refused(f"{place}.content", said.replace("can be trained on here", "is read here")) from None
    return {**checked, "content": content or ""} if nothing else checked
