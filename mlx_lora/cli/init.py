"""init."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from mlx_lora import ui
from mlx_lora.cli.options import Force, Json, Overrides, Yes, progress


def register(app: typer.Typer) -> None:
    app.command()(init)


def init(
    settings: Overrides = None,
    model: Annotated[str | None, typer.Option("--model", help="The base: a directory or a name.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="The rows: a file or a folder.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="What the adapter is to be called.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The recipe file; NAME.yaml by default.")] = None,
    yes: Yes = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Ask a few questions, look at machine, model and data, and write a recipe with the reason for each choice."""
    from mlx_lora.places.listing import model_names
    from mlx_lora.tasks.init import draft, write

    names = model_names()
    model = model or ui.ask("Which model", _only(names), yes=yes, known=names, option="--model MODEL")
    data = data or ui.ask("Which data, a file or a folder", None, yes=yes, option="--data PATH")
    name = name or ui.ask("What shall the adapter be called", Path(data).stem, yes=yes, option="--name NAME")
    system = None if yes or not ui.asks() else ui.ask("A system message in front of every row (none)", "", yes=yes)
    out = out or Path(f"{name}.yaml")
    with ExitStack() as stack:
        made = draft(model, data, name, system=system or None, overrides=settings, progress=progress(stack))
    write(made, out, force=force)
    if json:
        ui.as_json({"out": str(out), **made.as_dict()})
        return
    for line in made.text().splitlines():
        ui.result(line)
    takes = "" if made.plan.seconds is None else f", about {ui.duration(made.plan.seconds)}"
    ui.note(f"written to {out}; to train{takes}: mlx-lora train {out}")


def _only(names: list[str]) -> str | None:
    """The name to offer where there is one alone."""
    return names[0] if len(names) == 1 else None
