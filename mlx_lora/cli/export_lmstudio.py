"""export lmstudio."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from mlx_lora import ui
from mlx_lora.cli.export_hf import show_check
from mlx_lora.cli.options import Bits, Force, Json, Model, progress


def register(app: typer.Typer) -> None:
    app.command()(lmstudio)


def lmstudio(
    adapter: Annotated[str, typer.Option("--adapter", help="A name in the home, or a directory like ./mine.")],
    model: Model = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The directory to write; in LM Studio's own folder by default.")
    ] = None,
    bits: Annotated[Bits | None, typer.Option("--bits", help="As `fuse` takes it.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Measure on these rows instead of generated text.")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write base and adapter, fused, where LM Studio finds them."""
    from mlx_lora.tasks.export_fused import export_lmstudio

    with ExitStack() as stack:
        chosen = None if bits is None else str(bits)
        report = export_lmstudio(model, adapter, out, bits=chosen, data=data, force=force, progress=progress(stack))
    if json:
        ui.as_json(report)
        return
    ui.result(f"{report['out']}: {report['bits']}, {ui.size(report['bytes'])}")
    show_check(report)
    for note in report["notes"]:
        ui.note(note)
    ui.result(f"in LM Studio it is {report['name']}")
