"""generate and chat."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_lora import ui
from mlx_lora.cli.options import Adapter, Json, KvBits, Lookup, MaxTokens, Model, Seed, System, Temperature, Think

if TYPE_CHECKING:
    from mlx_lora.serve.service import Service
    from mlx_lora.serve.status import Options


def register(app: typer.Typer) -> None:
    app.command()(generate)
    app.command()(chat)


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
def _service(model: str | None, adapter: str | None, options: Options) -> Iterator[tuple[Service, str | None]]:
    """A service on the base, and what it calls the adapter that was given."""
    from mlx_lora.serve.service import open_service

    with ExitStack() as stack:
        loading = stack.enter_context(ExitStack())

        def stage(text: str) -> None:
            loading.enter_context(ui.working(text))

        service = stack.enter_context(open_service(model, [adapter] if adapter else [], options=options, stage=stage))
        loading.close()
        yield service, next(iter(service.places), None)


def chat(
    model: Model = None,
    adapter: Adapter = None,
    system: System = None,
    lookup: Lookup = True,
    kv_bits: KvBits = None,
) -> None:
    """Talk to the base and its adapters; /help inside."""
    from mlx_lora.serve.chat import Chat
    from mlx_lora.serve.status import Options

    with _service(model, adapter, Options(lookup, kv_bits)) as (service, name):
        conversation = Chat(service, name)
        if system is not None:
            conversation.commands.system(system)
        conversation.run()
