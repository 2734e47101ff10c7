"""tune."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_lora import ui
from mlx_lora.cli.options import Force, Json, Overrides

if TYPE_CHECKING:
    from mlx_lora.config import Recipe
    from mlx_lora.tasks.tuned import Tuned


def register(app: typer.Typer) -> None:
    app.command()(tune)


def tune(
    model: Annotated[str, typer.Option("--model", help="The base: a name of `models list`, or a directory.")],
    data: Annotated[str, typer.Option("--data", help="A file, or a folder with train and valid.")],
    settings: Overrides = None,
    minutes: Annotated[float, typer.Option("--minutes", min=0.1, help="How long to look, loading included.")] = 15.0,
    name: Annotated[str | None, typer.Option("--name", help="The adapter's name; the data's by default.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.yaml", help="Write the recipe here.")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Find rate, rank, targets and epochs by short trainings within some minutes, and print the recipe.

    Validation rows choose, test rows aren't read. What key=value sets stays as it is. The same command goes on where it
    was interrupted, or with more minutes where it ended.
    """
    from mlx_lora.recipe import load_recipe
    from mlx_lora.tasks.tuned import check_out, write

    given = {"model": model, "data.path": data, "name": name or Path(os.path.abspath(data)).stem}
    recipe = load_recipe(None, settings or [], settings=given)
    if out is not None:
        check_out(out, force=force)
    found = _search(recipe, settings or [], minutes)
    if out is not None:
        write(found, out, force=force)
    if json:
        ui.as_json({"out": None if out is None else str(out), **found.as_dict()})
        return
    for line in found.text().splitlines() if out is None else ():
        ui.result(line)
    for sentence in found.sentences():
        ui.note(sentence)
    if out is not None:
        ui.note(f"written to {out}; to train: mlx-lora train {out}")


def _search(recipe: Recipe, settings: list[str], minutes: float) -> Tuned:
    """Tune with a bar for each training; Ctrl-C loses only the one that it stops."""
    from mlx_lora.cli.live import listener
    from mlx_lora.cli.train import StopSignal
    from mlx_lora.tasks.tune import tune as run

    with ExitStack() as stack:
        stop = StopSignal(stack)

        def stage(text: str) -> None:
            stack.close()  # the training before is over, also one that has failed with its bar on the screen
            ui.note(text)

        try:
            return run(
                recipe, settings, minutes=minutes, listener=lambda: listener(stack, stop, quiet=True), stage=stage
            )
        except KeyboardInterrupt:
            stack.close()
            ui.note("the same command goes on; what is done is kept")
            raise typer.Exit(code=130) from None
