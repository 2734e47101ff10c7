"""runs list, show, compare, path, remove."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_lora import ui
from mlx_lora.cli.options import Json, Yes, agree

if TYPE_CHECKING:
    from mlx_lora.store.run import RunRecord

app = typer.Typer(help="The training runs in the home directory.", no_args_is_help=True, rich_markup_mode=None)
BYTES = ("peak_memory_bytes", "predicted_memory_bytes")
Name = Annotated[str, typer.Argument(metavar="NAME", help="A run in the home.")]


@app.command("list")
def list_runs(json: Json = False) -> None:
    """List the runs: how far they are, and which can go on."""
    from mlx_lora.store import run as runs

    summaries = [record.summary() for record in runs.list_runs()]
    if json:
        ui.as_json(summaries)
    elif not summaries:
        ui.note("no runs yet; `mlx-lora train` makes one")
    else:
        rows = [
            (
                s["name"], s["state"], f"{s['step']}/{s['steps'] or '?'}", s["train_loss"], s["best_valid_loss"],
                ui.size(s["bytes"]), (s["started"] or "")[:16],
            )
            for s in summaries
        ]  # fmt: skip
        ui.table(["name", "state", "step", "train loss", "best valid loss", "size", "started"], rows)


@app.command()
def show(name: Name, json: Json = False) -> None:
    """Show a run: its settings, its losses, why it stopped, and what can be done next."""
    from mlx_lora.store.run import read
    from mlx_lora.study.ending import ending
    from mlx_lora.tasks.show_run import changed_settings, details, losses, next_step, reason

    record = read(name)
    if json:
        ui.as_json(details(record))
        return
    _show_state(record, reason(record))
    if record.recipe:
        for key, value in changed_settings(record.recipe).items():
            ui.result(f"  {key}={value}")
    for text in record.notes:
        ui.result(f"note: {text}")
    if ended := ending(record):
        ui.result(ended.text)
    if table := losses(record):
        ui.table(["step", "train loss", "valid loss"], [tuple(line.values()) for line in table])
    if hint := next_step(record):
        ui.note(hint)


def _show_state(record: RunRecord, reason: str | None) -> None:
    stopped = f": {reason}" if reason else ""
    ui.result(f"{record.name} is {record.state}, {record.step} of {record.planned_steps or '?'} steps{stopped}")
    if record.finished:
        ui.result(
            f"{record.finished.trained_tokens} tokens trained in {record.finished.seconds:.0f} s, "
            f"peak {ui.size(record.finished.peak_memory_bytes)}"
        )


@app.command()
def compare(
    one: Annotated[str, typer.Argument(metavar="A", help="A run in the home.")],
    other: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    json: Json = False,
) -> None:
    """Show two runs beside each other: settings that differ, losses, time, memory, curves."""
    from mlx_lora.report.compare import as_dict, curves
    from mlx_lora.store.run import read

    records = read(one), read(other)
    found = as_dict(*records)
    if json:
        ui.as_json(found)
        return
    words: dict[str, Callable[[Any], str]] = {"seconds": ui.duration} | dict.fromkeys(BYTES, ui.size)
    table = [(key, *map(_value, values)) for key, values in found["settings"].items()]
    table += [
        (
            key.replace("_", " ").removesuffix(" bytes"),
            *(_value(each[key], words.get(key, str)) for each in found["results"]),
        )
        for key in found["results"][0]
        if key != "ending"
    ]
    ui.table(["", one, other], table)
    for name, each in zip((one, other), found["results"], strict=True):
        ui.result(f"{name}: {each['ending'] or 'no step was taken'}")
    for line in curves(*records, width=min(ui.out.width, 140)):
        ui.result(line)


def _value(value: Any, words: Callable[[Any], str] = str) -> str | None:
    """A cell: four digits of a number, or what `words` makes of it."""
    if value is None:
        return None
    return f"{value:.4g}" if isinstance(value, float) and words is str else words(value)


@app.command()
def path(name: Name) -> None:
    """Print where a run lies."""
    from mlx_lora.store import run as runs

    ui.result(str(runs.find(name)))


@app.command()
def remove(name: Name, yes: Yes = False) -> None:
    """Delete a run and its checkpoints; its adapter stays."""
    from mlx_lora.store import run as runs

    runs.find(name)
    agree(f"remove run {name} and its checkpoints?", yes=yes)
    ui.result(f"removed {name}, {ui.size(runs.remove(name))} freed")
