"""The command line: parse, call, show. No logic lives here, and nothing heavy is imported before a command runs.

`main` prepares the process (hub variables, BLAS, network guard) and turns errors into one line and an exit code:
0 done, 1 the user's input or environment, 2 usage, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import functools
import signal
import sys
from contextlib import nullcontext
from types import FrameType
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from mlx_lora import __version__, paths, ui
from mlx_lora.cli import (
    adapters,
    base,
    bench,
    chat,
    data,
    eval,
    export,
    init,
    machine,
    models,
    plan,
    quickstart,
    report,
    run,
    runs,
    serve,
    settings,
    study,
    train,
    tune,
    verdict,
)
from mlx_lora.errors import MlxLoraError
from mlx_lora.machine import blas, offline

HELP = """Fine-tune language models on this machine, with files that never leave it.

`mlx-lora quickstart` shows everything in a few minutes, without a network."""

app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
for room in (
    quickstart, machine, base, init, data, settings, plan, train, tune, eval, verdict, report, chat, run, serve, bench,
):  # fmt: skip
    room.register(app)
app.add_typer(models.app, name="models")
app.add_typer(adapters.app, name="adapters")
app.add_typer(export.app, name="export")
app.add_typer(runs.app, name="runs")
app.add_typer(study.app, name="study")


def _version(asked: bool) -> None:
    if asked:
        ui.result(f"mlx-lora {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


class Terminated(BaseException):
    """SIGTERM, as something that unwinds the stack."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    words = [word for word in arguments if word != "--debug"]
    may_connect = words[:1] == ["pull"]
    offline.set_hub_variables(offline=not may_connect)
    blas.load_blas()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's wish
            signal.signal(number, _terminate)
    with nullcontext() if may_connect else offline.network_guard(), ui.notes_shown():
        sys.exit(_run(words, debug))


@functools.cache
def _command() -> Any:
    """The commands, made by typer from the functions' signatures, once a process: a program may call `main` often."""
    return typer.main.get_command(app)


def _run(words: list[str], debug: bool) -> int:
    try:
        return int(_command().main(words, prog_name="mlx-lora", standalone_mode=False) or 0)
    except TyperException as fault:  # usage: unknown commands and options, values of the wrong type
        _show_usage(fault)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        ui.note("interrupted")
        return 130
    except Terminated:
        return 143
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except Exception as fault:
        if debug:
            ui.traceback()
        elif isinstance(fault, MlxLoraError):
            ui.error(fault)
        elif isinstance(fault, OSError):
            ui.error(paths.unusable(fault))
        else:
            ui.error(MlxLoraError(f"unexpected {type(fault).__name__}: {fault}", hint="--debug shows where"))
        return 1


def _show_usage(fault: TyperException) -> None:
    message = getattr(fault, "format_message", lambda: "")().replace("Value error, ", "")
    if "Usage:" in message or not message:  # a group called without a command: its help
        for line in message.splitlines():
            ui.note(line)
    else:
        ui.error(MlxLoraError(message, hint="--help after the command shows what it takes"))


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


__all__ = ["app", "main"]
