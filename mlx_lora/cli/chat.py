"""generate and chat."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_lora import ui
from mlx_lora.cli.options import Adapter, Json, MaxTokens, Model

if TYPE_CHECKING:
    from mlx_lora.serve.conversation import Trained
    from mlx_lora.serve.engine import Engine
    from mlx_lora.serve.service import Service


def register(app: typer.Typer) -> None:
    app.command()(generate)
    app.command()(chat)


System = Annotated[str | None, typer.Option("--system", help="A system message, as in training rows that have one.")]


Think = Annotated[bool | None, typer.Option("--think/--no-think", help="Ask a model that can think to think, or not.")]


def _engine(model: str | None, adapter: str | None) -> tuple[Engine, Trained]:
    """An engine with the adapter in use, and how that was trained."""
    from mlx_lora.models.unpack import unpack_once
    from mlx_lora.serve.conversation import Trained, trained
    from mlx_lora.serve.engine import Engine
    from mlx_lora.store import adapter as store
    from mlx_lora.store import registry
    from mlx_lora.store.base import base_for

    stored = store.read(registry.find(adapter)) if adapter else None
    opened = base_for(model, [stored] if stored else [])
    with ui.working(f"loading {model or registry.base_name(opened.path)}"):
        loaded = registry.open_base(opened, [stored] if stored else [])
        unpack_once(loaded)
    engine = Engine(loaded)
    if stored is not None:
        label = registry.label(stored.path)
        of_adapter = trained(stored)
        end = of_adapter.format(loaded.tokenizer).own_end
        engine.add(label, store.wrappers_for(engine.loaded.model, stored), end=end)
        engine.use(label)
    return engine, of_adapter if stored else Trained()


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
    from dataclasses import replace

    from mlx_lora.serve.answer import Answer, check_prompt, first_prompt, room_for_answer, stream_text
    from mlx_lora.serve.engine import Sampling

    text = sys.stdin.read() if prompt == "-" else prompt
    check_prompt(text)
    engine, trained = _engine(model, adapter)
    trained = replace(trained, template="none" if raw else trained.template)
    trained = replace(trained, thinking=trained.thinking if think is None else think)
    tokens = first_prompt(engine.loaded.tokenizer, text, system=system, trained=trained)
    room = room_for_answer(engine, tokens, hint="a shorter prompt fits")
    if room is not None and max_tokens > room:
        ui.warning(f"this model's context has room for {room:,} tokens of an answer; text beyond may make no sense")
    answer, sampling = Answer(), Sampling(temperature=temp, seed=seed)
    with ui.slow_bar("reading the prompt") as on_prompt:
        for piece in stream_text(engine, tokens, answer, max_tokens=max_tokens, sampling=sampling, on_prompt=on_prompt):
            if not json:
                ui.piece(piece)
    if json:
        ui.as_json(answer.as_dict())
    else:
        ui.result()


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


def chat(model: Model = None, adapter: Adapter = None, system: System = None) -> None:
    """Talk to the base and its adapters; /help inside."""
    from mlx_lora.serve.chat import Chat

    with _service(model, adapter) as (service, name):
        conversation = Chat(service, name)
        if system is not None:
            conversation.commands.system(system)
        conversation.run()
