"""Tokens of rendered chats, however many are encoded at a time, are the tokenizer's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mlx_lora.models.chat_format import ChatFormat, opens
from tests.data.conftest import tokenizers  # noqa: F401

TEXTS = ["", " ", "a", "<|user|>naïve 日本<|end|>\n<|assistant|>", "  two  spaces\n\n", "<think>\n\n</think>"]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("adds_end", [False, True])
def test_many_texts_give_the_tokens_that_each_gives_alone(
    tokenizers: Callable[..., Any],  # noqa: F811
    adds_end: bool,
    special: bool,
) -> None:
    tokenizer = tokenizers("plain", adds_end=adds_end)
    alone = [list(tokenizer.encode(text, add_special_tokens=special)) for text in TEXTS]
    assert ChatFormat(tokenizer).encode(TEXTS, special=special) == alone


@pytest.mark.parametrize(
    ("template", "reasoning", "thinks"),
    [
        ("plain", "unknown", False),
        ("opening", "field", True),
        ("hiding", "opened", True),
        ("channel", "field", True),
        ("switching", "field", True),
        ("quoting", "unknown", False),
    ],
)
def test_what_a_template_does_with_thinking_is_found_by_rendering(
    tokenizers: Callable[..., Any],  # noqa: F811
    template: str,
    reasoning: str,
    thinks: bool,
) -> None:
    chat = ChatFormat(tokenizers(template))
    assert (chat.reasoning, chat.thinks) == (reasoning, thinks)


def test_a_prompt_is_inside_reasoning_where_the_last_mark_opens_it() -> None:
    marks = ("<think>", "</think>")
    assert opens("a<think>\n", marks) and not opens("a<think>\n</think>", marks) and not opens("a", marks)
