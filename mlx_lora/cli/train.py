"""train."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_lora import ui
from mlx_lora.cli.options import Base, Force, Json, RecipeWords, Rows
from mlx_lora.cli.settings import TrainCommand
from mlx_lora.errors import MlxLoraError, PeerFailed


def register(app: typer.Typer) -> None:
    app.command(cls=TrainCommand)(train)


def train(
    settings: RecipeWords = None,
    model: Base = None,
    data: Rows = None,
    name: Annotated[str | None, typer.Option("--name", help="The adapter's name; the recipe's by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run of this name.")] = False,
    force: Force = False,
    samples: Annotated[
        bool | None,
        typer.Option("--samples/--no-samples", help="Show answers at the end; by default in a terminal."),
    ] = None,
    tensorboard: Annotated[
        Path | None,
        typer.Option("--tensorboard", metavar="DIR", help="Write the run's numbers there for TensorBoard, too."),
    ] = None,
    json: Json = False,
) -> None:
    """Train an adapter from a recipe, from options, or from both. Ctrl-C saves what there is; --resume goes on."""
    from mlx_lora.cli.ended import check_end, show
    from mlx_lora.cli.live import listener
    from mlx_lora.recipe import load_recipe
    from mlx_lora.store.run import RECIPE, find
    from mlx_lora.tasks.train import train_adapter
    from mlx_lora.train.distributed import processes

    words = list(settings or [])
    file = Path(words.pop(0)) if words and "=" not in words[0] else None
    given = {key: value for key, value in (("model", model), ("data.path", data), ("name", name)) if value is not None}
    group = processes()
    if group.rank:
        ui.silence()  # the first process speaks for all
    try:
        with ExitStack() as stack, group.connected():
            stop = StopSignal(stack)
            with group.agreed():
                if resume and file is None and name is not None and model is None and data is None:
                    file = find(name) / RECIPE  # the run knows its own
                recipe = load_recipe(file, words, settings=given)
            heard = listener(stack, stop, live=not json)
            if tensorboard and not group.rank:
                heard = heard.also(_tensorboard(stack, tensorboard))
            run = train_adapter(recipe, force=force, resume=resume, listener=heard, group=group)
    except MlxLoraError as error:
        if group.size > 1:  # the launcher terminates all processes once one has ended: each keeps its own exit code
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if group.rank and isinstance(error, PeerFailed):
            raise typer.Exit(code=1) from None
        raise
    if group.rank:
        samples = False
    show(run, json=json, samples=ui.moves() and not json if samples is None else samples)
    check_end(run, stop)


def _tensorboard(stack: ExitStack, folder: Path) -> Callable[[Any], None]:
    from mlx_lora.report.tensorboard import tensorboard

    return stack.enter_context(tensorboard(folder))


class StopSignal:
    """From `install` on, the first SIGINT, SIGTERM or SIGHUP asks training to save and stop, the second ends it all.

    Before, signals do what they always do: nothing has been learned yet. One that this process was started to ignore,
    as by nohup, or by a script that put it in the background, stays ignored.
    """

    def __init__(self, stack: ExitStack):
        self.code = 0
        self.stack = stack

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self.stack.callback(signal.signal, number, signal.signal(number, self._ask))

    def __call__(self) -> bool:
        return self.code != 0

    def _ask(self, number: int, frame: Any) -> None:
        if self.code:
            raise SystemExit(self.code)
        self.code = 130 if number == signal.SIGINT else 143
        with suppress(OSError):  # the terminal may be what has gone
            ui.note("stopping after this step, then saving; once more to leave at once")
