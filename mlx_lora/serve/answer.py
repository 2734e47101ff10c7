"""Prompts as tokens: those that training rows have before an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_lora.config import Data
from mlx_lora.data.encode import Encoder
from mlx_lora.data.example import Example
from mlx_lora.errors import DataError, MlxLoraError, Problem
from mlx_lora.serve.conversation import Trained

NO_SYSTEM = "without a chat template there is no system message"
ANY = Trained()


def check_prompt(text: str) -> None:
    """Raise MlxLoraError for a prompt of nothing but white space: whatever came back would answer nothing."""
    if not text.strip():
        raise MlxLoraError("the prompt is empty", hint="--prompt TEXT, or --prompt - to read it from stdin")


def first_prompt(tokenizer: Any, text: str, *, system: str | None, trained: Trained) -> list[int]:
    """Tokens of a question that begins a conversation, with the adapter's own system line where `system` is None.

    Raises as `prompt_tokens`, and for a system line without a template.
    """
    if system and trained.template == "none":
        raise MlxLoraError(NO_SYSTEM, hint="leave --system out, and put its text into the prompt")
    messages = [{"role": "user", "content": text}]
    if system is None:
        messages = trained.with_system(messages)
    elif system:
        messages = [{"role": "system", "content": system}, *messages]
    return prompt_tokens(tokenizer, messages, trained)


def prompt_tokens(tokenizer: Any, messages: Sequence[dict[str, Any]], trained: Trained = ANY) -> list[int]:
    """Tokens that an answer to `messages` starts from: those that training rows have before the answer.

    Without a template, the last message's text as it stands. Raises DataError when the tokenizer has no chat template,
    or when the template refuses the messages.
    """
    template, text = "none" if trained.template == "none" else "auto", str(messages[-1]["content"])
    example = Example(messages=tuple(messages), prompt_messages=len(messages), plain=(text, ""))
    encoder = Encoder(tokenizer, Data(template=template), trained.format(tokenizer))
    try:
        if encoder.templated(example):
            return encoder.prompt(messages, thinking=trained.thinking)
        return encoder.prompt_tokens(example)
    except ValueError as error:
        raise DataError([Problem("prompt", 0, str(error))]) from None


def first_answer(
    tokenizer: Any, messages: Sequence[dict[str, Any]], tokens: Sequence[int], trained: Trained = ANY
) -> int | None:
    """Where the first answer starts in `tokens`, the prompt tokens of `messages`; None where they hold no answer."""
    first = next((index for index, message in enumerate(messages) if message["role"] == "assistant"), 0)
    if trained.template == "none" or not first:
        return None
    before = prompt_tokens(tokenizer, messages[:first], trained)
    # where the history reads differently, training has a row of its own for each answer, and the infix before it
    return len(before) if list(tokens[: len(before)]) == before else None
