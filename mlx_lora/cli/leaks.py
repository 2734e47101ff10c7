"""study leaks and data canaries: what an adapter gives away of its training rows, and rows planted to measure it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_lora import ui
from mlx_lora.cli.options import Force, Json, Model, Overrides, data_settings, progress

if TYPE_CHECKING:
    from mlx_lora.study.leak_report import Leaks


def leaks(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A directory, or a name in the home.")],
    data: Annotated[str, typer.Option("--data", help="The training rows: a file, or a folder with train.")],
    settings: Overrides = None,
    held_out: Annotated[
        str | None, typer.Option("--held-out", metavar="FILE", help="Rows it never saw; test or valid by default.")
    ] = None,
    model: Model = None,
    rows: Annotated[int, typer.Option("--rows", min=2, help="Most rows of each kind to look at.")] = 200,
    given: Annotated[int, typer.Option("--given", min=1, help="Tokens of a row to give, to get the rest.")] = 8,
    candidates: Annotated[
        int, typer.Option("--candidates", min=15, max=9999, help="Secrets that each planted one is ranked among.")
    ] = 255,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write rows that come back, with text, to .jsonl.")
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Measure how much of its training rows an adapter gives away, beside its base and rows it never saw."""
    from mlx_lora.tasks.leaks import Depth, audit_leaks

    with ExitStack() as stack:
        found = audit_leaks(
            model,
            adapter,
            data,
            lambda stored: data_settings(settings, stored),
            held_out=held_out,
            depth=Depth(rows, given, candidates),
            out=out,
            force=force,
            progress=progress(stack),
            stage=ui.note,
        )
    for note in found.notes:
        ui.warning(note)
    if json:
        ui.as_json(found.as_dict())
        return
    ui.table(
        ["measured", "training rows", "base", "adapter", "held-out rows", "base", "adapter"], list(_measured(found))
    )
    if found.canaries:
        ui.result()
        ui.table(["canaries", "secrets", "first", "extracted", "bits", "bits, base"], list(_canaries(found)))
        most = found.candidates.bit_length() - 1
        ui.result(f"first: more likely than {found.candidates - 1} other secrets; unseen ones have about 1.4 bits")
        ui.note(f"(the most that can be measured with {found.candidates} secrets is {most} bits)")
    ui.result()
    ui.result(found.sentence)


def _measured(found: Leaks) -> Iterator[tuple[object, ...]]:
    """A line for each way to ask, then the losses and how well they tell training rows from others."""
    names = {"answers": "answers verbatim", "rests": f"rows verbatim after {found.given} tokens"}
    for one in found.extraction:
        held: tuple[object, ...] = (None, None, None)
        if one.held_out and one.held_out_base:
            held = one.held_out.rows, one.held_out_base.count, one.held_out.count
        yield (names[one.asked], one.adapter.rows, one.base.count, one.adapter.count, *held)
    if losses := found.losses:
        members, others = losses.of_adapter.members, losses.of_adapter.others
        yield (
            "mean loss a row",
            members,
            losses.members_base,
            losses.members,
            others,
            losses.others_base,
            losses.others,
        )
        yield ("AUC of the loss", members, losses.of_base.auc, losses.of_adapter.auc, others, None, None)
        yield ("AUC of loss less base's", members, None, losses.of_both.auc, others, None, None)


def _canaries(found: Leaks) -> Iterator[tuple[object, ...]]:
    from mlx_lora.study.leak_report import times

    for one in found.canaries:
        yield (times(one.repeats), one.secrets, one.first, one.extracted, one.exposure, one.exposure_base)


def canaries(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A file, or a folder with train, valid and test.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write the copy to.")],
    settings: Overrides = None,
    repeat: Annotated[str, typer.Option("--repeat", help="How often they are planted, one number a group.")] = "1,4,16",
    each: Annotated[int, typer.Option("--each", min=1, help="Canaries in each group.")] = 4,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another number makes other secrets.")] = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Copy data and plant rows with random secrets in it; study leaks then finds what an adapter remembers."""
    from mlx_lora.data.canaries import checked_repeats
    from mlx_lora.tasks.plant_canaries import plant_canaries

    try:
        repeats = checked_repeats(repeat.split(","))
    except ValueError:
        raise typer.BadParameter(f"--repeat {repeat} is not a list of numbers from 1, like 1,4,16") from None
    with ExitStack() as stack:
        done = plant_canaries(
            path, out, data_settings(settings), repeats=repeats, each=each, seed=seed, force=force,
            progress=progress(stack),
        )  # fmt: skip
    if json:
        ui.as_json(done.as_dict())
        return
    for name, rows in done.rows.items():
        planted = f", {done.copies:,} of them planted" if name == "train" else ""
        ui.result(f"{out / f'{name}.jsonl'}: {rows:,} rows{planted}")
    ui.result(f"{done.canaries} secrets, {each} of each: planted {', '.join(map(str, repeats))} times")
    ui.note(f"train on {out}, then: mlx-lora study leaks ADAPTER --data {out}")
