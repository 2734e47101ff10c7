"""study compare."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_lora import ui
from mlx_lora.cli.options import Force, Json
from mlx_lora.errors import RecipeError, TrainingError

if TYPE_CHECKING:
    from mlx_lora.study.compare import Line

COLUMNS = ["recipe", "method", "parameters", "learning rate", "loss", "exact match", "seconds", "peak", "adapter"]


def register(app: typer.Typer) -> None:
    app.command()(compare)


def compare(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE|FOLDER… [key=value]…",
            help="Recipes, folders of them, or methods, matrices, ranks; then settings for all of them.",
        ),
    ],
    rates: Annotated[
        list[float] | None,
        typer.Option(
            "--learning-rate", min=0, help="Try each recipe with this one too; repeatable. Validation chooses."
        ),
    ] = None,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="Judge by the first N test rows.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the comparison; the folder's by default.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write results here instead of the home.")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Train recipes on the same rows and compare them. Run it again to go on after Ctrl-C: what is done is kept."""
    from mlx_lora.cli.live import listener
    from mlx_lora.cli.train import StopSignal
    from mlx_lora.study.compare import rates_of, read, verdict
    from mlx_lora.tasks.compare import compare as run

    sources, overrides = [word for word in words if "=" not in word], [word for word in words if "=" in word]
    if not sources:
        raise RecipeError("there is nothing to compare", hint="name recipes, a folder, or methods, matrices or ranks")
    name = name or (Path(sources[0]).stem if len(sources) == 1 else "comparison")
    runs = read(sources, overrides, rates or rates_of(sources))
    with ExitStack() as stack:
        stop = StopSignal(stack)

        def stage(text: str) -> None:
            stack.close()  # the training before is over, and so is its way of handling signals
            if stop.code:  # asked for when that had no step left to stop before
                raise KeyboardInterrupt
            ui.note(text)

        try:
            outcome = run(
                name, runs, out=out, rows=rows, force=force,
                listener=lambda: listener(stack, stop, quiet=True), stage=stage,
            )  # fmt: skip
        except KeyboardInterrupt:
            ui.note("the same command goes on; what is done is kept")
            raise typer.Exit(code=stop.code or 130) from None
    if json:
        ui.as_json({**outcome.as_dict(), "verdict": verdict(outcome.lines)})
    else:
        ui.table(COLUMNS, [_row(line) for line in outcome.lines])
        for text in ("", *verdict(outcome.lines), str(outcome.plot or outcome.file)):
            ui.result(text)
    if failed := [f"{line.recipe}: {line.error}" for line in outcome.lines if line.error]:
        raise TrainingError("not all could be compared:\n  " + "\n  ".join(failed), hint="the others are kept")


def _row(line: Line) -> list[object]:
    """Numbers as text: a base has few of them, and a column with gaps isn't set to the right otherwise."""
    return [
        line.recipe,
        line.method,
        f"{line.parameters:>11,}",
        None if line.learning_rate is None else f"{line.learning_rate:g}",
        None if line.loss is None else f"{line.loss:.4f}",
        None if line.exact_match is None else f"{line.exact_match:.2f}",
        None if line.seconds is None else f"{line.seconds:.1f}",
        None if line.peak_memory_bytes is None else ui.size(line.peak_memory_bytes),
        None if line.adapter_bytes is None else ui.size(line.adapter_bytes),
    ]
