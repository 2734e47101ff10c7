"""study subspace, compare and leaks: instruments that look into adapters, and at recipes side by side."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_lora import ui
from mlx_lora.cli import compare, leaks
from mlx_lora.cli.options import Json

app = typer.Typer(help="Instruments to study adapters with.", no_args_is_help=True, rich_markup_mode=None)
compare.register(app)
app.command()(leaks.leaks)
Studied = Annotated[str, typer.Argument(metavar="ADAPTER", help="A directory, or a name in the home.")]
Factor = StrEnum("Factor", ["a", "b"])


@app.command()
def subspace(
    first: Studied,
    second: Studied,
    of: Annotated[Factor, typer.Option("--of", help="a: directions of the inputs; b: of the outputs.")] = Factor.a,  # type: ignore[attr-defined]
    model: Annotated[str | None, typer.Option("--model", help="Their base: also how much they amplify.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.png", help="Draw heat maps.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Draws the Gaussian control.")] = 0,
    json: Json = False,
) -> None:
    """Measure how much of two adapters' subspaces is shared, module by module, against a Gaussian control."""
    from mlx_lora.store import registry
    from mlx_lora.store.adapter import read
    from mlx_lora.study import subspace as study

    if out is not None:
        study.check_drawing(out)
    adapters = read(registry.find(first)), read(registry.find(second))
    network = None
    if model is not None:
        with ui.working(f"loading {model}"):
            network = registry.open_stored(model, adapters).model
    overlaps = study.subspaces(*adapters, of=str(of), seed=seed, model=network)
    if out is not None:
        study.draw(overlaps, (adapters[0].name, adapters[1].name), out, of=str(of))
        ui.note(f"heat maps: {out}")
    report = study.report(*adapters, overlaps, str(of))
    if json:
        ui.as_json(report)
        return
    _show(report, study.by_projection(overlaps), study.mean)


def _show(report: dict[str, Any], groups: dict[str, Any], mean: Any) -> None:
    """A line for each kind of projection, then what the paper has to compare with."""
    columns, rows = ["projection", "modules", "φ(1,1)", "control", "φ(all)", "control"], []
    for name, group in groups.items():
        row: list[Any] = [name, len(group)]
        row += [values[place, place].item() for place in (0, -1) for values in mean(group)]
        if group[0].amplification is not None:
            factors = [factor for overlap in group for factor in overlap.amplification if factor is not None]
            row.append(sum(factors) / len(factors) if factors else None)
        rows.append(row)
    ui.table([*columns, "amplification"][: len(rows[0])], rows)
    ui.result(
        f"the top direction: φ(1,1) {report['top']['phi']:.3g}, {report['top']['random_phi']:.3g} between Gaussian "
        "matrices; the LoRA paper (§7.2) found above 0.5 between ranks 8 and 64 on GPT-3"
    )
