"""export ollama."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_lora import ui
from mlx_lora.cli.export_hf import show_check
from mlx_lora.cli.options import Force, Json, Model, progress


def register(app: typer.Typer) -> None:
    app.command()(ollama)


def ollama(
    adapter: Annotated[str, typer.Option("--adapter", help="A name in the home, or a directory like ./mine.")],
    out: Annotated[Path, typer.Option("--out", help="The directory to write.")],
    model: Model = None,
    type_name: Annotated[str, typer.Option("--type", help="Of the merged weights: f16, q8_0, q4_k_m, …")] = "q8_0",
    as_adapter: Annotated[
        bool, typer.Option("--as-adapter", help="Don't merge: Ollama puts the adapter over --from. Newer ones refuse.")
    ] = False,
    over: Annotated[
        str | None, typer.Option("--from", help="With --as-adapter: the base in Ollama, or its GGUF file.")
    ] = None,
    as_lora: Annotated[
        int | None, typer.Option("--as-lora", min=1, help="With --as-adapter: the nearest LoRA of this rank.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="Check on these rows instead of generated text.")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write what `ollama create` takes: base and adapter merged as GGUF, with template, stop words and parameters."""
    from mlx_lora.tasks.export_gguf import export_gguf
    from mlx_lora.tasks.export_ollama import export_ollama

    if as_adapter != (over is not None):
        raise typer.BadParameter("--as-adapter and --from go together: the base that Ollama has, like llama3.2:1b")
    if as_lora is not None and not as_adapter:
        raise typer.BadParameter("--as-lora is about an adapter: a merged model holds all of any method")
    with ExitStack() as stack:
        report = export_ollama(
            model, adapter, out, write=export_gguf, type_name=type_name, over=over, rank=as_lora, data=data,
            force=force, progress=progress(stack),
        )  # fmt: skip
    if json:
        ui.as_json(report)
        return
    _show(report)


def _show(report: dict[str, Any]) -> None:
    ui.result(f"{report['out']}: {report['type'] or 'an adapter'}, {ui.size(report['bytes'])}")
    show_check(report)
    for note in report["notes"]:
        ui.note(note)
    stops = " ".join(ui.one_line(stop) for stop in report["stops"])
    ui.result(f"template: {report['template']}; stop words: {stops or 'none'}")
    ui.result(report["command"])
