"""eval."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

import typer

from mlx_lora import ui
from mlx_lora.cli.options import Adapters, Json, MaxTokens, Model, Overrides, data_settings, progress


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


def evaluate(
    data: Annotated[str, typer.Option("--data", help="A file, or a folder whose test file is used.")],
    settings: Overrides = None,
    model: Model = None,
    adapter: Adapters = None,
    exact: Annotated[bool, typer.Option("--exact", help="Also generate answers and count exact matches.")] = False,
    max_tokens: MaxTokens = 256,
    json: Json = False,
) -> None:
    """Loss, perplexity and exact match of the base and of each adapter, in one load."""
    from mlx_lora.tasks.evaluate import evaluate_adapters

    with ExitStack() as stack:
        evaluation = evaluate_adapters(
            model,
            adapter or [],
            data,
            lambda stored: data_settings(settings, stored),
            exact=exact,
            max_tokens=max_tokens,
            progress=progress(stack),
            stage=ui.note,
            warn=ui.warning,
        )
    if json:
        ui.as_json(evaluation.as_dict())
        return
    rows = [(r.adapter or "(base)", r.loss, r.perplexity, r.tokens, r.rows, r.exact_match) for r in evaluation.results]
    ui.table(["adapter", "loss", "perplexity", "tokens", "rows", "exact match"], rows)
