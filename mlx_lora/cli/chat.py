"""generate and chat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mlx_lora import ui
from mlx_lora.cli.options import Adapter, Json, MaxTokens, Model

if TYPE_CHECKING:
    from mlx_lora.serve.engine import Engine


def register(app: typer.Typer) -> None:
    app.command()(generate)
    app.command()(chat)


def _engine(model: str | None, adapter: str | None) -> tuple[Engine, str | None]:
    """An engine with the adapter in use, and the template that it was trained with."""
    from mlx_lora.serve.engine import Engine
    from mlx_lora.store import adapter as store
    from mlx_lora.store import registry
    from mlx_lora.store.base import base_for

    stored = store.read(registry.find(adapter)) if adapter else None
    opened = base_for(model, [stored] if stored else [])
    with ui.working(f"loading {model or registry.base_name(opened.path)}"):
        engine = Engine(registry.open_base(opened, [stored] if stored else []))
    if stored is not None:
        label = registry.label(stored.path)
        engine.add(label, store.wrappers_for(engine.loaded.model, stored))
        engine.use(label)
    return engine, stored.manifest.template if stored else None


def generate(
    prompt: Annotated[str, typer.Option("--prompt", help="What to answer; - reads it from stdin.")],
    model: Model = None,
    adapter: Adapter = None,
    max_tokens: MaxTokens = 256,
    temp: Annotated[float, typer.Option("--temp", min=0.0, help="Temperature; 0 is greedy.")] = 0.0,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Seed of the sampling; without it, every run differs.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Encode the prompt as it is, without a chat template.")] = False,
    json: Json = False,
) -> None:
    """Answer one prompt."""
    import sys

    from mlx_lora.serve.answer import Answer, prompt_tokens, stream_text
    from mlx_lora.serve.engine import Sampling

    text = sys.stdin.read() if prompt == "-" else prompt
    engine, template = _engine(model, adapter)
    tokens = prompt_tokens(
        engine.loaded.tokenizer,
        [{"role": "user", "content": text}],
        template="none" if raw else template or "chat",
    )
    answer = Answer()
    sampling = Sampling(temperature=temp, seed=seed)
    for piece in stream_text(engine, tokens, answer, max_tokens=max_tokens, sampling=sampling):
        if not json:
            ui.piece(piece)
    if not json:
        ui.result()
        return
    ui.as_json(
        {
            "text": answer.text,
            "prompt_tokens": answer.prompt_tokens,
            "generated_tokens": answer.generated_tokens,
            "tokens_per_second": answer.tokens_per_second,
            "finish_reason": answer.finish_reason,
        }
    )


def chat(model: Model = None, adapter: Adapter = None) -> None:
    """Talk to the base and its adapters; /help inside."""
    from mlx_lora.serve.chat import Chat

    engine, template = _engine(model, adapter)
    Chat(engine, template=template or "chat").run()
