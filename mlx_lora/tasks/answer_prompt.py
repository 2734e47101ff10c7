"""Answer one prompt, with nothing else running: what `generate` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mlx_lora.errors import MlxLoraError
from mlx_lora.models.context import context_length
from mlx_lora.serve.answer import Answer, check_prompt, first_prompt
from mlx_lora.serve.prefill import OnPrompt
from mlx_lora.serve.requests import Sampling
from mlx_lora.serve.scheduler import Limits
from mlx_lora.serve.service import Prompt, Service, open_service
from mlx_lora.serve.status import Options
from mlx_lora.store import registry

Say = Callable[[str], None]


@dataclass(frozen=True)
class Question:
    """A prompt and how it is answered. `system` None is the adapter's own; with `raw` there is no chat template.

    `thinking` None is as the adapter was trained. `lookup` and `kv_bits` as `serve.status.Options` has them.
    """

    text: str
    system: str | None = None
    raw: bool = False
    thinking: bool | None = None
    max_tokens: int = 256
    sampling: Sampling = Sampling()
    lookup: bool = True
    kv_bits: int | None = None


def answer_prompt(
    question: Question, model: str | None, adapter: str | None, answer: Answer, *, stage: Say, warn: Say, read: OnPrompt
) -> Iterator[str]:
    """Yield pieces of text as they are made, and fill `answer`; `read(done, total)` counts tokens of the prompt.

    Raises MlxLoraError for a prompt that is empty or longer than the model's context, else as `open_service` and
    `first_prompt` do.
    """
    check_prompt(question.text)
    limits = Limits(rows=1, waiting=1, prompt_cache_bytes=0)
    options = Options(question.lookup, question.kv_bits)
    with open_service(model, [adapter] if adapter else [], limits=limits, options=options, stage=stage) as service:
        name = registry.label(registry.find(adapter)) if adapter else None
        trained = service.trained(name)
        trained = replace(
            trained, template="none" if question.raw else trained.template,
            thinking=trained.thinking if question.thinking is None else question.thinking,
        )  # fmt: skip
        tokens = first_prompt(service.tokenizer, question.text, system=question.system, trained=trained)
        _check_room(service, tokens, question.max_tokens, warn)
        answer.prompt_tokens = len(tokens)
        read(0, len(tokens))
        reply = service.ask(
            Prompt(tuple(map(int, tokens))), name,
            max_tokens=question.max_tokens, sampling=question.sampling, on_prompt=read,
        )  # fmt: skip
        for piece in reply:
            answer.generated_tokens, answer.seconds = reply.tokens, reply.seconds
            yield piece.text
        answer.text, answer.generated_tokens, answer.seconds = reply.text, reply.tokens, reply.seconds
        if reply.finished is not None:
            answer.finish_reason = reply.finished.reason


def _check_room(service: Service, tokens: list[int], wanted: int, warn: Say) -> None:
    """Raise MlxLoraError for a prompt that is too long, and warn where the answer will be cut."""
    context = context_length(service.config)
    if context is None:
        return
    if len(tokens) > context:
        raise MlxLoraError(
            f"the prompt has {len(tokens):,} tokens, this model's context is {context:,}", hint="a shorter prompt fits"
        )
    room = context - len(tokens) + 1  # the last token is never read
    if wanted > room:
        warn(f"this model's context has room for {room:,} tokens of an answer, which ends there")
