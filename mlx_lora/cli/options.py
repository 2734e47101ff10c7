"""Options that several commands share, and how a screen listens to long work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_lora import paths, ui

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value as the last line of stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what exists.")]
# A word with a separator, or that begins with . or ~, is a path; any other is a name in the home first (`paths.find`).
Model = Annotated[
    str | None,
    typer.Option("--model", help="A name of `models list`, else a directory (as ./x); an adapter knows its own."),
]
Adapter = Annotated[str | None, typer.Option("--adapter", help="A name in the home, or a directory like ./mine.")]
Adapters = Annotated[list[str] | None, typer.Option("--adapter", help="A name, or a directory; repeatable.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens to generate for an answer.")]
System = Annotated[str | None, typer.Option("--system", help="A system message, as in training rows that have one.")]
Think = Annotated[bool | None, typer.Option("--think/--no-think", help="Ask a model that can think to think, or not.")]
Temperature = Annotated[float, typer.Option("--temp", min=0.0, help="Temperature; 0 is greedy.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of the sampling; without it, every run differs.")]
Lookup = Annotated[
    bool,
    typer.Option("--lookup/--no-lookup", help="Draft what an answer copies out of its prompt where that is faster."),
]
KvBits = Annotated[
    int | None, typer.Option("--kv-bits", help="Bits of keys and values, 8 or 4: less memory for a prompt.")
]
RecipeWords = Annotated[
    list[str] | None, typer.Argument(metavar="[RECIPE] [key=value]…", help="A recipe file, then its overrides.")
]
Base = Annotated[str | None, typer.Option("--model", help="The base: a name of `models list`, or a directory.")]
Rows = Annotated[str | None, typer.Option("--data", help="A file, or a folder with train, valid and test.")]
Out = Annotated[Path | None, typer.Argument(metavar="OUT", help="The directory to write; not needed with --name.")]
NewModel = Annotated[str | None, typer.Option("--name", help="Write to the home's models: --model NAME then uses it.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value]…", help="Recipe settings, dotted keys.")]

Forget = Annotated[
    str | None, typer.Option("--forget", metavar="FILE", help="General text that must not suffer; none: don't look.")
]

# How a fused model is written, as `interop.fuse` takes it.
Bits = StrEnum("Bits", {"mixed": "mixed", "keep": "keep", "eight": "8", "sixteen": "16"})
Yes = Annotated[bool, typer.Option("--yes", help="Don't ask.")]


def progress(stack: ExitStack) -> Callable[[str, int | None], Callable[[], None]]:
    """A progress listener for reading and measuring rows; each new bar takes the place of the one before."""

    def start(label: str, total: int | None) -> Callable[[], None]:
        stack.close()
        advance = stack.enter_context(ui.bar(label, total))
        return lambda: advance(1, "")

    return start


def new_model(out: Path | None, name: str | None) -> Path:
    """Where a new model is written: the directory OUT, or the home's models under `name`."""
    if out is not None and name is None:
        return out
    if name is not None and out is None:
        return paths.room("models", name)
    raise typer.BadParameter("name one place to write to: the directory OUT, or --name NAME for the home's models")


def data_settings(overrides: list[str] | None, stored: dict[str, Any] | None = None) -> Any:
    """Data settings: the defaults, then those an adapter was trained with, then `data.key=value` overrides."""
    from mlx_lora.errors import RecipeError
    from mlx_lora.recipe import load_recipe
    from mlx_lora.settings import translated

    overrides = [translated(word) for word in overrides or []]
    unused = [word for word in overrides if not word.startswith("data.") or word.startswith("data.path=")]
    if unused:
        raise RecipeError(f"{', '.join(unused)}: only data settings apply here", hint="like data.template=none")
    kept = {f"data.{key}": value for key, value in (stored or {}).items() if key != "path"}
    return load_recipe(None, overrides, settings=kept).data


def number(text: str) -> float:
    """A number given to --scale. Raises a usage error for anything else."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"--scale is {text!r}, a number or auto is needed") from None


def agree(question: str, *, yes: bool) -> None:
    """Ask before something is deleted, unless `--yes` was given; a no ends the command with code 1."""
    if not yes and not ui.confirm(question):
        ui.note("nothing was removed; --yes removes without asking")
        raise typer.Exit(code=1)
