"""report: one HTML file on a run or a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_lora import ui
from mlx_lora.cli.options import Json, Model, Rows


def register(app: typer.Typer) -> None:
    app.command()(report)


def report(
    name: Annotated[str, typer.Argument(metavar="RUN|VERDICT", help="A run or a verdict in the home.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The file to write; only one named here gets rows and answers.")
    ] = None,
    texts: Annotated[
        bool, typer.Option("--texts/--no-texts", help="Rows and answers, where --out names the file.")
    ] = True,
    model: Model = None,
    data: Rows = None,
    json: Json = False,
) -> None:
    """Write one HTML file: curves, memory, data, settings, answers, intervals. It loads nothing from elsewhere."""
    from mlx_lora.tasks import report as reports

    file = out or Path(f"{name}.html")
    record = reports.find(name)
    reports.check(file)
    with ui.slow_bar("answering rows") as update:
        content = reports.report(
            record, texts=texts and out is not None, model=model, data=data, stage=ui.note, on_token=update
        )
    reports.write(file, content)
    if texts and out is None:
        ui.note(f"without rows and answers: --out {file} writes those too")
    if json:
        ui.as_json({"out": str(file), "bytes": len(content.encode())})
    else:
        ui.result(str(file))
