"""adapters list, show, path, rename, remove, verify, merge, blend, import, export."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mlx_lora import ui
from mlx_lora.cli.export_hf import show_check
from mlx_lora.cli.options import Base, Force, Forget, Json, Yes, agree, data_settings, number, progress
from mlx_lora.methods import ADAPTER_FORMATS, MERGES

app = typer.Typer(help="The adapters in the home directory.", no_args_is_help=True, rich_markup_mode=None)
Way = StrEnum("Way", {way: way for way in MERGES})  # type: ignore[misc]
To = StrEnum("To", {name: name for name in ADAPTER_FORMATS})  # type: ignore[misc]
Name = Annotated[str, typer.Argument(metavar="NAME", help="An adapter in the home.")]


@app.command("list")
def list_adapters(json: Json = False) -> None:
    """List the adapters."""
    from mlx_lora.store import registry

    entries = registry.entries()
    if json:
        ui.as_json([asdict(entry) for entry in entries])
    elif not entries:
        ui.note("no adapters yet; `mlx-lora quickstart` or `mlx-lora train` makes some")
    else:
        rows = [
            (e.name, e.state, e.method, e.rank, e.base, ui.size(e.bytes), e.valid_loss, e.created[:16]) for e in entries
        ]
        ui.table(["name", "state", "method", "rank", "base", "size", "valid loss", "created"], rows)


@app.command()
def show(name: Name, json: Json = False) -> None:
    """Say what an adapter is: its method, targets, base, data and losses; --json prints its whole manifest."""
    from mlx_lora.store import registry
    from mlx_lora.store.manifest import read_manifest
    from mlx_lora.store.summary import summary

    path = registry.find(name)
    if json:
        ui.as_json(read_manifest(path).model_dump())
        return
    for label, text in summary(path):
        ui.result(f"{label:9} {text}")


@app.command()
def path(name: Name) -> None:
    """Print where an adapter lies."""
    from mlx_lora.store import registry

    ui.result(str(registry.find(name)))


@app.command()
def rename(
    old: Annotated[str, typer.Argument(metavar="OLD")], new: Annotated[str, typer.Argument(metavar="NEW")]
) -> None:
    """Rename an adapter and its run."""
    from mlx_lora.store import registry

    ui.result(str(registry.rename(old, new)))


@app.command()
def remove(name: Name, yes: Yes = False) -> None:
    """Delete an adapter and its run."""
    from mlx_lora.store import registry

    registry.find_by_name(name)
    agree(f"remove adapter {name} and its run?", yes=yes)
    ui.result(f"removed {name}, {ui.size(registry.remove(name))} freed")


@app.command()
def verify(
    name: Name,
    model: Annotated[str | None, typer.Option("--model", help="The base that it must fit; its own by default.")] = None,
) -> None:
    """Check an adapter's files, and that it fits its base."""
    from mlx_lora.tasks.verify import verify_adapter

    tensors, base = verify_adapter(name, model, note=ui.note)
    ui.result(f"{name}: {tensors} tensors, all in order{f', fits {base}' if base else ''}")


@app.command()
def merge(
    adapters: Annotated[list[str], typer.Argument(metavar="NAME[:WEIGHT]", help="A weight below zero subtracts.")],
    name: Annotated[str, typer.Option("--name", help="The new adapter's name.")],
    method: Annotated[Way, typer.Option("--method", help="cat and linear are exact.")] = Way.cat,  # type: ignore[attr-defined]
    rank: Annotated[int | None, typer.Option("--rank", help="The most that a module may have.")] = None,
    tolerance: Annotated[
        float | None, typer.Option("--tolerance", help="Relative error up to which ranks are made smaller.")
    ] = None,
    density: Annotated[float | None, typer.Option("--density", help="Share of entries kept; 0.5 by default.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which entries dare drops.")] = 0,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Rows of an adapter's task, [NAME=]PATH: evaluate; repeatable.")
    ] = None,
    model: Base = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Add adapters of one base up into a new one, by their updates."""
    from mlx_lora.store.arithmetic import MergeSettings
    from mlx_lora.tasks.merge import merge_adapters
    from mlx_lora.tasks.merge_check import check_merge, commands, rows_of_parents

    settings = MergeSettings(str(method), rank=rank, tolerance=tolerance, density=density, seed=seed)
    rows = rows_of_parents(adapters, data or [])
    with ui.working(f"merging {len(adapters)} adapters"):
        report = merge_adapters(adapters, name, settings, force=force)
    with ExitStack() as stack:
        tasks = check_merge(name, rows, model=model, progress=progress(stack))
    if tasks:
        report["tasks"] = [task.as_dict() for task in tasks]
    for task in tasks:
        if task.fell:
            ui.warning(
                f"{name} has lost most of {task.parent}'s task: loss {task.merged_loss:.3f} on {task.data}, with "
                f"{task.parent} {task.parent_loss:.3f}, without an adapter {task.base_loss:.3f}"
            )
    if not tasks:
        ui.note("a merge can lose one of its tasks, so evaluate all of them (or merge with --data):")
        for line in commands(adapters, name, model=model):
            ui.note(f"  {line}")
    if json:
        ui.as_json(report)
        return
    error = f", relative error {report['relative_error']:.2g}" if report["relative_error"] else ""
    ui.result(
        f"{report['adapter']}: {report['method']}, rank {report['rank']} on {report['modules']} modules, "
        f"{ui.size(report['bytes'])}{error}"
    )
    if tasks:
        header = ["task of", "rows", "loss of the base", "of the adapter", "of the merge", "gain kept"]
        rows_shown = [(t.parent, t.data, t.base_loss, t.parent_loss, t.merged_loss, f"{t.kept:.0%}") for t in tasks]
        ui.table(header, rows_shown)


@app.command()
def blend(
    adapter: Annotated[str, typer.Argument(metavar="NAME", help="A name in the home, or a directory like ./mine.")],
    scale: Annotated[str, typer.Option("--scale", metavar="X|auto", help="1 is the adapter, 0.5 half of its update.")],
    name: Annotated[str, typer.Option("--name", help="The new adapter's name.")],
    model: Base = None,
    data: Annotated[
        str | None, typer.Option("--data", help="For auto: the task's rows, of which valid is used.")
    ] = None,
    forget: Forget = None,
    max_drift: Annotated[
        float | None, typer.Option("--max-drift", min=0, help="For auto: most nats of KL a token on general text.")
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Scale an adapter's update, between the base and the adapter.

    auto tries some scales on the task's rows and on general text, and takes the one with the least loss within
    --max-drift, or without that the smallest one that keeps 90 % of the gain.
    """
    from mlx_lora.errors import AdapterError
    from mlx_lora.tasks.blend import blend as at_scale
    from mlx_lora.tasks.blend import blend_auto

    for_auto = {"--data": data, "--forget": forget, "--max-drift": max_drift}
    unused = [option for option, value in for_auto.items() if value is not None]
    if scale != "auto" and unused:
        raise AdapterError(
            f"--scale {scale} looks at no rows, so {' and '.join(unused)} would change nothing",
            hint="--scale auto finds the scale with them",
        )
    if scale != "auto":
        blended = at_scale(adapter, number(scale), name, force=force)
    elif data is None:
        raise AdapterError("--scale auto evaluates on the task's rows", hint="name them with --data")
    else:
        with ExitStack() as stack:
            blended = blend_auto(
                adapter, name, data, lambda stored: data_settings(None, stored), model=model, forget=forget,
                max_drift=max_drift, force=force, progress=progress(stack), stage=ui.note, warn=ui.warning,
            )  # fmt: skip
    if json:
        ui.as_json(blended.as_dict())
        return
    if blended.tried:
        header = ["scale", "loss", "gain kept", "KL on the task", "KL on general text", "loss there", ""]
        base = ("0 (base)", blended.base_loss, "0%", 0.0, 0.0, blended.base_loss_general, "")
        rows: list[tuple[object, ...]] = [base]
        rows += [
            (f"{t.scale:g}", t.loss, f"{t.kept:.0%}", t.kl_task, t.kl_general, t.loss_general,
             "chosen" if t.scale == blended.scale else "")
            for t in blended.tried
        ]  # fmt: skip
        ui.table(header, rows)
    ui.result(f"{blended.adapter}: {adapter} at scale {blended.scale:g}")


@app.command("import")
def import_adapter(
    source: Annotated[Path, typer.Argument(metavar="PATH", help="A directory of PEFT or mlx-lm, or a .gguf file.")],
    name: Annotated[str, typer.Option("--name", help="The new adapter's name.")],
    model: Annotated[str, typer.Option("--model", help="The base: a name in the home, or a directory.")],
    force: Force = False,
    json: Json = False,
) -> None:
    """Bring an adapter of another tool into the home.

    PEFT's and mlx-lm's are directories, llama.cpp's a .gguf file. Everything in it must be understood and fit the base,
    else it is refused by name and nothing is written.
    """
    from mlx_lora.tasks.import_adapter import import_adapter

    with ui.working("reading the adapter and its base"):
        imported = import_adapter(source, name, model, force=force)
    report = imported.as_dict()
    if json:
        ui.as_json(report)
        return
    ranks = f", rank {imported.rank}" if imported.rank else ""
    ui.result(
        f"{imported.path}: {imported.method}{ranks} on {imported.modules} modules of {imported.base}, "
        f"{ui.size(report['bytes'])}"
    )


@app.command("export")
def export_adapter(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name in the home, or a directory like ./mine.")],
    to: Annotated[To, typer.Option("--to", help="The tool that is to read it.")],
    out: Annotated[Path, typer.Option("--out", help="The directory to write.")],
    model: Base = None,
    as_lora: Annotated[
        int | None, typer.Option("--as-lora", metavar="RANK", min=1, help="Write the nearest LoRA of this rank.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Check on these rows, not on generated text; none: don't check.")
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write an adapter for PEFT or mlx-lm.

    PEFT's is for transformers, vLLM and others. What the other tool can't say is refused by name. --as-lora writes the
    LoRA nearest to any method that changes weights, and prints how near it is. --model names the base where it isn't
    found by itself.
    """
    from mlx_lora.tasks.export_adapter import export_adapter

    with ExitStack() as stack:
        exported = export_adapter(
            name, str(to), out, model=model, rank=as_lora, checked_on=data, force=force, progress=progress(stack)
        )
    report = exported.as_dict()
    if json:
        ui.as_json(report)
        return
    ranks = f", rank {exported.rank}" if exported.rank else ""
    error = f", relative error {exported.relative_error:.2g}" if as_lora is not None else ""
    ui.result(
        f"{exported.out}: {exported.method}{ranks} on {exported.modules} modules, {ui.size(report['bytes'])}{error}"
    )
    show_check(report)
