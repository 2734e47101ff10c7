"""export gguf."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from mlx_lora import ui
from mlx_lora.cli.export_hf import show_check
from mlx_lora.cli.options import Force, Json, Model, progress


def register(app: typer.Typer) -> None:
    app.command()(gguf)


def gguf(
    adapter: Annotated[str, typer.Option("--adapter", help="A name in the home, or a directory like ./mine.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write, like mine.gguf.")],
    model: Model = None,
    fused: Annotated[bool, typer.Option("--fused", help="Base and adapter merged, instead of an adapter.")] = False,
    type_name: Annotated[
        str | None, typer.Option("--type", help="With --fused: f16, f32, bf16, q8_0, q4_1, q4_0, q4_k_m and others.")
    ] = None,
    as_lora: Annotated[
        int | None, typer.Option("--as-lora", min=1, help="Write the nearest LoRA of this rank, and its error.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="Check on these rows instead of generated text.")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a GGUF adapter for llama.cpp, or base and adapter merged as a GGUF model."""
    from mlx_lora.tasks.export_gguf import export_gguf

    if type_name is not None and not fused:
        raise typer.BadParameter("--type is about a whole model: add --fused")
    if as_lora is not None and fused:
        raise typer.BadParameter("--as-lora is about an adapter: a merged model holds all of any method")
    with ExitStack() as stack:
        report = export_gguf(
            model, adapter, out, fused=fused, type_name=type_name or "f16", rank=as_lora, data=data, force=force,
            progress=progress(stack),
        )  # fmt: skip
    if json:
        ui.as_json(report)
        return
    what = f"merged, {report['type']}" if fused else f"an adapter of {report['modules']} modules"
    ui.result(f"{report['out']}: {what}, {ui.size(report['bytes'])}")
    if fused:
        ui.result("tensors: " + ", ".join(f"{count} {kind}" for kind, count in sorted(report["tensors"].items())))
    if as_lora is not None:
        ui.result(f"the nearest LoRA of rank {as_lora} is {report['relative_error']:.2%} away from the update")
    show_check(report)
