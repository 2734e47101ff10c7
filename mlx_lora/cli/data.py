"""data check."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

import typer

from mlx_lora import ui
from mlx_lora.cli.options import Json, Overrides, data_settings, progress

SHOWN = 20


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Look at data before training on it.", no_args_is_help=True, rich_markup_mode=None)
    group.command()(check)
    app.add_typer(group, name="data")


def check(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A file, or a folder with train, valid and test.")],
    settings: Overrides = None,
    model: Annotated[str | None, typer.Option("--model", help="Count tokens with this model's tokenizer.")] = None,
    show: Annotated[int, typer.Option("--show", min=0, help="Print the first rows, marking what is learned.")] = 0,
    json: Json = False,
) -> None:
    """Check every row: problems with file and line, tokens, duplicates, leaks. Exit code 1 when there are problems."""
    from mlx_lora.data import check as checking
    from mlx_lora.data.encode import Encoder
    from mlx_lora.data.read import find_splits, read
    from mlx_lora.models.open import load_tokenizer

    if show and model is None:
        raise typer.BadParameter("--show needs --model, whose tokenizer and chat template it shows")
    chosen = data_settings(settings)
    tokenizer = load_tokenizer(model) if model else None
    with ExitStack() as stack:
        report = checking.check(path, chosen, tokenizer, progress=progress(stack))
    if show:
        first = next(iter(find_splits(path).values()))
        for runs in checking.samples(read(first, chosen), Encoder(tokenizer, chosen), show):
            ui.runs_of_text(runs)
    if json:
        ui.as_json(report.as_dict())
    else:
        for problem in report.problems[:SHOWN]:
            ui.result(str(problem))
        if len(report.problems) > SHOWN:
            ui.result(f"… and {len(report.problems) - SHOWN} more")
        facts = {key: value for key, value in report.as_dict().items() if value is not None and key != "problems"}
        for key, value in facts.items():
            ui.result(f"{key.replace('_', ' '):16} {value}")
        ui.result(f"{'problems':16} {len(report.problems)}")
    if report.problems:
        raise typer.Exit(code=1)
