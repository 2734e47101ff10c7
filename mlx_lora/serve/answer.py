"""Text in and out: the chat template before the engine, the streaming detokenizer after it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lora.config import Data
from mlx_lora.data.encode import Encoder
from mlx_lora.data.example import Example
from mlx_lora.errors import DataError, MlxLoraError, Problem
from mlx_lora.models.context import context_length
from mlx_lora.serve.conversation import Trained
from mlx_lora.serve.engine import Engine, Sampling
from mlx_lora.serve.prefill import OnPrompt

NO_SYSTEM = "without a chat template there is no system message"
ANY = Trained()


@dataclass
class Answer:
    """A finished generation; `seconds` include reading the prompt."""

    text: str = ""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    finish_reason: str = "length"

    @property
    def tokens_per_second(self) -> float:
        return self.generated_tokens / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The keys of `generate --json`."""
        return {
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "tokens_per_second": self.tokens_per_second,
            "finish_reason": self.finish_reason,
        }


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


def room_for_answer(engine: Engine, prompt: Sequence[int], *, hint: str) -> int | None:
    """Tokens of an answer that the model's context has room for; None where the model doesn't say.

    Raises MlxLoraError, with `hint`, where the prompt alone is longer: beyond its context a model answers nonsense.
    """
    context = context_length(engine.loaded.config)
    if context is None:
        return None
    length = len(prompt) + (engine.virtual.count if engine.virtual else 0)
    if length > context:
        raise MlxLoraError(f"the prompt has {length:,} tokens, this model's context is {context:,}", hint=hint)
    return context - length + 1  # the last token is never read


def stream_text(
    engine: Engine,
    prompt: Sequence[int],
    answer: Answer,
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    first_answer: int | None = None,
    on_prompt: OnPrompt = lambda done, total: None,
) -> Iterator[str]:
    """Yield pieces of text as they are generated, filling `answer` on the way; the rest as `Engine.stream` takes it."""
    detokenizer = engine.loaded.tokenizer.detokenizer
    answer.prompt_tokens = len(prompt)
    start = time.perf_counter()
    for token in engine.stream(
        prompt, max_tokens=max_tokens, sampling=sampling, first_answer=first_answer, on_prompt=on_prompt
    ):
        detokenizer.add_token(token)
        answer.generated_tokens += 1
        answer.seconds = time.perf_counter() - start
        if piece := detokenizer.last_segment:
            yield piece
    detokenizer.finalize()
    if piece := detokenizer.last_segment:
        yield piece
    answer.text = detokenizer.text
    answer.seconds = time.perf_counter() - start
    answer.finish_reason = "length" if answer.generated_tokens >= max_tokens else "stop"
