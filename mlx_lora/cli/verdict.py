"""verdict: did it help, did it hurt."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_lora import ui
from mlx_lora.cli.eval import Database, OwnScorer, Pattern, Tolerance
from mlx_lora.cli.options import Adapters, Force, Forget, Json, MaxTokens, Model, Overrides, data_settings, progress

if TYPE_CHECKING:
    from mlx_lora.tasks.verdict import Judgement, Judgements


def register(app: typer.Typer) -> None:
    app.command()(verdict)


def verdict(
    data: Annotated[str, typer.Option("--data", help="A file, or a folder whose test file is used.")],
    settings: Overrides = None,
    model: Model = None,
    adapter: Adapters = None,
    forget: Forget = None,
    score: Annotated[str, typer.Option("--score", help="auto, loss, or a score of `eval`.")] = "auto",
    database: Database = None,
    pattern: Pattern = None,
    scorer: OwnScorer = None,
    tolerance: Tolerance = None,
    max_tokens: MaxTokens = 256,
    name: Annotated[str | None, typer.Option("--name", help="The record's name; the adapters' by default.")] = None,
    examples: Annotated[int, typer.Option("--examples", min=0, help="Fixed and broken rows to show.")] = 3,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.json", help="Write all rows with their text here.")
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Say whether adapters have helped, and what was lost elsewhere, against the base on the same rows.

    One sentence first, then the numbers and some rows by example. The record in the home has no text of the rows.
    """
    from mlx_lora.errors import MlxLoraError
    from mlx_lora.study.scores.choose import Given
    from mlx_lora.tasks.verdict import Judging, judge_adapters
    from mlx_lora.tasks.verdict_rows import check_out, write_rows

    if not adapter:
        raise MlxLoraError("there is no adapter to judge", hint="name one with --adapter; `adapters list` shows all")
    if out is not None:
        check_out(out, force=force, sources=[data, forget, database, scorer])
    judging = Judging(score, Given(database, pattern, scorer, tolerance), forget, max_tokens)
    with ExitStack() as stack:
        found = judge_adapters(
            model, adapter, data, lambda stored: data_settings(settings, stored), judging,
            name=name, progress=progress(stack), stage=ui.note, warn=ui.warning,
        )  # fmt: skip
    if json:
        ui.as_json(found.record.as_dict())
    else:
        for one in found.each:
            _show(one, found, examples)
        if len(found.each) > 1:
            ui.note("each interval is for one comparison; with several, one in twenty is off by chance")
    if out is not None:  # last: where there is no room for it, all else has been said
        write_rows(found, out)
        ui.note(f"rows with their text: {out}")


def _show(one: Judgement, found: Judgements, examples: int) -> None:
    """The sentence, the table, and rows by example."""
    from mlx_lora.tasks.verdict_rows import examples_of, table_of

    ui.result(f"{one.adapter} {one.sentence}")
    ui.result()
    ui.table(["", "base", one.adapter, "difference", "95 % interval"], table_of(one))
    for what, rows in (("fixed", one.compared.fixed), ("broken", one.compared.broken)):
        if rows and examples:
            ui.result()
            ui.result(f"{what}: {len(rows)} of {len(one.compared.pairs)} rows, such as")
            for line in examples_of(one, found, rows[:examples]):
                ui.result(f"  {line}")
    ui.result()
    if one.word == "helped" and one.forgot:
        ui.note(
            f"to lose less elsewhere: `adapters blend {one.adapter} --scale auto` finds how much of the adapter is"
            " enough, and train.max_drift keeps a new one closer to its base"
        )
