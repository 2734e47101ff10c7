"""bench."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mlx_lora import ui
from mlx_lora.cli.options import Json


def register(app: typer.Typer) -> None:
    app.command()(bench)


def bench(
    model: Annotated[str | None, typer.Option("--model", help="The base; the embedded one by default.")] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows in a step.")] = 4,
    length: Annotated[int, typer.Option("--length", min=4, help="Positions in a row.")] = 128,
    lengths: Annotated[
        list[int] | None, typer.Option("--by-length", min=4, help="Also one row of this length; repeatable.")
    ] = None,
    quantize: Annotated[int | None, typer.Option("--quantize", help="Bits to quantize the base to.")] = None,
    json: Json = False,
) -> None:
    """Measure training on this machine: time and memory of a step, and the floor that its matrix products set."""
    from mlx_lora import paths
    from mlx_lora.models.load import load
    from mlx_lora.recipe import load_recipe
    from mlx_lora.study import bench as measuring
    from mlx_lora.study.products import Work

    settings = {} if quantize is None else {"quantize.bits": quantize}
    quantization = load_recipe(None, settings=settings, where="mlx-lora bench").quantize
    ui.note(f"loading {model or 'the embedded base'}")
    loaded = load(model or paths.bundled("data", "base"), quantization=quantization)
    work = Work(rows, length)
    results = measuring.bench(loaded, work, lengths=lengths or measuring.LENGTHS, stage=ui.note)
    if json:
        ui.as_json({"model": loaded.path.name, "rows": rows, "length": length, "results": results})
        return
    ui.table(["measured", "value"], [(entry["name"], _value(**entry)) for entry in results])


def _value(name: str, value: Any, unit: str) -> str:
    """A number with its unit, for people."""
    if unit == "bytes":
        return ui.size(value)
    if unit == "1/s":
        return f"{value / 1e9:.4g} GFLOP/s"
    if unit == "s":
        return f"{value:.4g} s" if value >= 1 else f"{value * 1000:.4g} ms"
    return f"{value:.4g}{'' if unit == 'ratio' else f' {unit}'}"
