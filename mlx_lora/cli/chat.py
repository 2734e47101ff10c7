"""generate and chat."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_lora import ui
from mlx_lora.cli.options import Adapter, Json, MaxTokens, Model

if TYPE_CHECKING:
    from mlx_lora.serve.service import Prompt, Reply, Service


def register(app: typer.Typer) -> None:
    app.command()(generate)
    app.command()(chat)


System = Annotated[str | None, typer.Option("--system", help="A system message, as in training rows that have one.")]


Think = Annotated[bool | None, typer.Option("--think/--no-think", help="Ask a model that can think to think, or not.")]


@contextmanager
def _service(model: str | None, adapter: str | None) -> Iterator[tuple[Service, str | None]]:
    """A service on the base, and what it calls the adapter that was given."""
    from mlx_lora.serve.service import open_service

    with ExitStack() as stack:
        loading = stack.enter_context(ExitStack())

        def stage(text: str) -> None:
            loading.enter_context(ui.working(text))

        service = stack.enter_context(open_service(model, [adapter] if adapter else [], stage=stage))
        loading.close()
        yield service, next(iter(service.places), None)


def generate(
    prompt: Annotated[str, typer.Option("--prompt", help="What to answer; - reads it from stdin.")],
    model: Model = None,
    adapter: Adapter = None,
    system: System = None,
    max_tokens: MaxTokens = 256,
    temp: Annotated[float, typer.Option("--temp", min=0.0, help="Temperature; 0 is greedy.")] = 0.0,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Seed of the sampling; without it, every run differs.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Encode the prompt as it is, without a chat template.")] = False,
    think: Think = None,
    json: Json = False,
) -> None:
    """Answer one prompt."""
    import sys

    from mlx_lora.errors import TooLong
    from mlx_lora.serve.answer import check_prompt
    from mlx_lora.serve.requests import Sampling

    text = sys.stdin.read() if prompt == "-" else prompt
    check_prompt(text)
    with _service(model, adapter) as (service, name):
        tokens = _first_prompt(service, name, text, system=system, raw=raw, think=think)
        with ui.slow_bar("reading the prompt") as on_prompt:
            sampling = Sampling(temperature=temp, seed=seed)
            reply = service.ask(tokens, name, max_tokens=max_tokens, sampling=sampling, on_prompt=on_prompt)
            try:
                for piece in reply:
                    if not json:
                        ui.piece(piece.text)
            except TooLong as fault:
                fault.hint = "a shorter prompt fits"
                raise
    ui.as_json(_answer(tokens, reply)) if json else ui.result()
    if reply.finished is not None and reply.finished.reason == "length" and reply.tokens < max_tokens:
        ui.warning(f"cut: this model's context has room for {reply.tokens:,} tokens of an answer to this prompt")


def _first_prompt(
    service: Service, adapter: str | None, text: str, *, system: str | None, raw: bool, think: bool | None
) -> Prompt:
    from dataclasses import replace

    from mlx_lora.serve.answer import first_prompt
    from mlx_lora.serve.service import Prompt

    trained = service.trained(adapter)
    trained = replace(trained, template="none" if raw else trained.template)
    trained = replace(trained, thinking=trained.thinking if think is None else think)
    return Prompt(tuple(first_prompt(service.tokenizer, text, system=system, trained=trained)))


def _answer(prompt: Prompt, reply: Reply) -> dict[str, object]:
    """The keys of `generate --json`."""
    return {
        "text": reply.text,
        "prompt_tokens": len(prompt.tokens),
        "generated_tokens": reply.tokens,
        "tokens_per_second": reply.tokens_per_second,
        "finish_reason": reply.finished.reason if reply.finished else None,
    }


def chat(model: Model = None, adapter: Adapter = None, system: System = None) -> None:
    """Talk to the base and its adapters; /help inside."""
    from mlx_lora.serve.chat import Chat

    with _service(model, adapter) as (service, name):
        conversation = Chat(service, name)
        if system is not None:
            conversation.commands.system(system)
        conversation.run()
