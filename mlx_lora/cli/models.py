"""models list and path: the models on this disk, and the names that they are used by."""

from __future__ import annotations

from typing import Annotated

import typer

from mlx_lora import ui
from mlx_lora.cli.options import Json

app = typer.Typer(help="The models on this disk.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_models(json: Json = False) -> None:
    """List the models of the home, the hub cache, LM Studio, Ollama and llama.cpp; nothing is fetched.

    `--model` takes by name what is used with --model, in place; `import-gguf` the others.
    """
    show_models(json=json)


@app.command()
def path(name: Annotated[str, typer.Argument(metavar="NAME", help="As `models list` prints it.")]) -> None:
    """Print where a model lies."""
    from mlx_lora.errors import ModelError
    from mlx_lora.places import listing

    found = listing.by_name(name)
    if found is None:
        close = listing.close_to(name)
        similar = f"; did you mean {close[0]!r}?" if close else ""
        raise ModelError(f"no model {name!r} on this disk{similar}", hint="mlx-lora models list")
    ui.result(str(found.path))


def show_models(*, kind: str | None = None, json: bool = False) -> None:
    """Print what was found, of one kind or of all; notes on broken entries go beside it."""
    from mlx_lora.places import listing

    everything = listing.find_all()
    found = [model for model in everything.models if kind in (None, model.kind)]
    for note in everything.notes:
        ui.note(note)
    if json:
        ui.as_json([model.as_dict() for model in found])
    elif not found:
        ui.note("no models found; `mlx-lora pull` downloads one")
    else:
        rows = [(m.name, m.place, m.kind, m.architecture, ui.size(m.bytes), _use(m.use, m.why)) for m in found]
        ui.table(["name", "from", "kind", "architecture", "size", "use with"], rows)


def _use(use: str, why: str) -> str:
    if not use:
        return f"– ({why})"
    return f"{use} ({why})" if why else use
