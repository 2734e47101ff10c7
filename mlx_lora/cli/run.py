"""run: a file of prompts in, a file of answers out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_lora import ui
from mlx_lora.cli.options import Adapter, Force, Json, MaxTokens, Model, Seed, System, Temperature, Think


def register(app: typer.Typer) -> None:
    app.command()(run)


def run(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Rows with prompt or messages, or a text file, a prompt a line.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The file to write: a line of JSON for each row.")],
    model: Model = None,
    adapter: Adapter = None,
    system: System = None,
    max_tokens: MaxTokens = 256,
    temp: Temperature = 0.0,
    seed: Seed = None,
    raw: Annotated[bool, typer.Option("--raw", help="Encode prompts as they are, without a chat template.")] = False,
    think: Think = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, help="Rows answered at once; by default as many as memory allows.")
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Answer a file of prompts. Run it again to go on where it was stopped.

    A row may name its own adapter (null: the base) and max_tokens; all its other fields are carried along. A row that
    can't be answered has an error in its place, and the command then ends with code 1.
    """
    from mlx_lora.tasks.answer_file import Asking, answer_file

    asking = Asking(max_tokens, temp, seed, system, raw, think, rows)
    done = answer_file(file, out, model, adapter, asking, bar=ui.bar, force=force, stage=ui.note)
    if json:
        ui.as_json(done.as_dict())
    else:
        ui.result(
            f"{done.out}: {done.rows - done.failed:,} of {done.rows:,} rows answered, {done.generated_tokens:,} tokens "
            f"in {ui.duration(done.seconds)}, {done.tokens_per_second:.0f} tokens a second"
        )
    if done.failed:
        ui.warning(f"{done.failed:,} of {done.rows:,} rows failed; their lines say why under `error`")
        raise typer.Exit(code=1)
