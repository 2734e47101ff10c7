"""generate and chat."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_lora import ui
from mlx_lora.cli.options import Adapter, Json, KvBits, Lookup, MaxTokens, Model, Seed, System, Temperature, Think

if TYPE_CHECKING:
    from mlx_lora.serve.conversation import Trained
    from mlx_lora.serve.engine import Engine
    from mlx_lora.serve.service import Service


def register(app: typer.Typer) -> None:
    app.command()(generate)
    app.command()(chat)


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
    temp: Temperature = 0.0,
    seed: Seed = None,
    raw: Annotated[bool, typer.Option("--raw", help="Encode the prompt as it is, without a chat template.")] = False,
    think: Think = None,
    lookup: Lookup = True,
    kv_bits: KvBits = None,
    json: Json = False,
) -> None:
    """Answer one prompt."""
    import sys

    from mlx_lora.serve.answer import Answer
    from mlx_lora.serve.requests import Sampling
    from mlx_lora.tasks.answer_prompt import Question, answer_prompt

    text = sys.stdin.read() if prompt == "-" else prompt
    sampling = Sampling(temperature=temp, seed=seed)
    question, answer = Question(text, system, raw, think, max_tokens, sampling, lookup, kv_bits), Answer()
    with ui.slow_bar("reading the prompt") as read:
        for piece in answer_prompt(question, model, adapter, answer, stage=ui.note, warn=ui.warning, read=read):
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
