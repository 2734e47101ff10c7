"""export hf."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_lora import ui
from mlx_lora.cli.options import Force, Json, Model, progress


def register(app: typer.Typer) -> None:
    app.command()(hf)


def hf(
    adapter: Annotated[str, typer.Option("--adapter", help="A name in the home, or a directory like ./mine.")],
    out: Annotated[Path, typer.Option("--out", help="The directory to write.")],
    model: Model = None,
    data: Annotated[str | None, typer.Option("--data", help="Check on these rows instead of generated text.")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write base and adapter, fused in half precision, as transformers loads it."""
    from mlx_lora.tasks.export_fused import export_hf

    with ExitStack() as stack:
        report = export_hf(model, adapter, out, data=data, force=force, progress=progress(stack))
    if json:
        ui.as_json(report)
        return
    ui.result(f"{report['out']}: {ui.size(report['bytes'])}")
    show_check(report)


def show_check(report: dict[str, Any]) -> None:
    """Say what the artefact's own program said of it, or why it wasn't asked."""
    check = report["check"]
    if check is None:
        ui.warning(f"what was written was not checked: {report['unchecked']}")
        return
    ui.result(
        f"{check['program']}, at {check['positions']} positions: {check['kept']:.0%} (±{check['kept_error']:.0%}) "
        "of the adapter's effect is in it, "
        f"KL to base and adapter {check['kl']:.4f} nats, same top token {check['top1_agreement']:.1%}"
    )
    if check["quantization_kl"] is not None:
        ui.result(f"the number format alone changes the base by {check['quantization_kl']:.4f} nats")
