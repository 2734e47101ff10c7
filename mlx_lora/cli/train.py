"""train."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_lora import ui
from mlx_lora.cli.options import Base, Force, Json, RecipeWords, Rows, progress
from mlx_lora.cli.settings import TrainCommand
from mlx_lora.errors import MlxLoraError, PeerFailed, TrainingError

if TYPE_CHECKING:
    from mlx_lora.tasks.train import Listener, TrainedRun


def register(app: typer.Typer) -> None:
    app.command(cls=TrainCommand)(train)


def train(
    settings: RecipeWords = None,
    model: Base = None,
    data: Rows = None,
    name: Annotated[str | None, typer.Option("--name", help="The adapter's name; the recipe's by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run of this name.")] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Train an adapter from a recipe, from options, or from both. Ctrl-C saves what there is; --resume goes on."""
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
            run = train_adapter(recipe, force=force, resume=resume, listener=listener(stack, stop), group=group)
    except MlxLoraError as error:
        if group.size > 1:  # the launcher terminates all processes once one has ended: each keeps its own exit code
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if group.rank and isinstance(error, PeerFailed):
            raise typer.Exit(code=1) from None
        raise
    if json:
        ui.as_json(run.as_dict())
    else:
        _show(run.as_dict())
    _check_end(run, stop)


def _check_end(run: TrainedRun, stop: StopSignal) -> None:
    """Say what there is of a run that didn't finish, and how it goes on; end with its exit code."""
    step, stopped_by = run.finished.iters, run.finished.stopped_by
    saved = f"what was learned up to step {step} is saved"
    if run.kept_old:
        saved = (
            f"what was learned up to step {step} is kept in the run; the adapter {run.name!r} is still the one from "
            "before, until the run has finished"
        )
    if stopped_by == "nonfinite":
        raise TrainingError(
            f"the loss or the gradient was not finite three steps in a row; {saved}",
            hint="lower train.learning_rate, or check the data with `mlx-lora data check`",
        )
    if stopped_by == "memory":
        raise TrainingError(
            f"training took more memory than it may; {saved}",
            hint=f"close other programs and go on: mlx-lora train --name {run.name} --resume; see `mlx-lora plan`",
        )
    if stopped_by == "interrupted":
        ui.note(saved)
        ui.note(f"mlx-lora train --name {run.name} --resume goes on")
        raise typer.Exit(code=stop.code)


def _show(result: dict[str, Any]) -> None:
    losses = ", ".join(
        f"{label} {result[key]:.4f}"
        for label, key in (("train loss", "train_loss"), ("validation loss", "best_valid_loss"))
        if result[key] is not None
    )
    ui.result(
        f"{result['name']}: {losses}; {result['iters']} steps in {result['seconds']:.0f} s, "
        f"{result['tokens_per_second']:.0f} trained tokens/s, peak {ui.size(result['peak_memory_bytes'])}"
    )
    if result["skipped_steps"]:
        ui.warning(f"{result['skipped_steps']} steps were not finite and skipped")
    ui.result(result["adapter"])


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


def listener(stack: ExitStack, stop: StopSignal, *, quiet: bool = False) -> Listener:
    """A screen for one training run: bars on a terminal, plain lines elsewhere."""
    from mlx_lora.tasks.train import Listener
    from mlx_lora.train.events import Evaluated, Finished, Note, Step

    bars = stack.enter_context(ExitStack())
    advance: Callable[[int, str], None] | None = None
    untrained: float | None = None
    shown = 0

    def show(event: Any) -> None:
        nonlocal advance, untrained, shown
        if isinstance(event, Step):
            if advance is None:
                bars.close()
                advance = bars.enter_context(ui.bar("training", event.steps))
            advance(event.step - shown, _step(event))
            shown = event.step
        elif isinstance(event, Evaluated):
            untrained = event.loss if not event.step else untrained
            ui.note(f"step {event.step}: validation loss {event.loss:.4f}{' (best)' if event.best else ''}")
        elif isinstance(event, Note):
            ui.note(event.text)
        elif isinstance(event, Finished):
            bars.close()
            if untrained is not None and (event.best_valid_loss or 0) > untrained:
                ui.warning("the adapter is worse on the validation rows than the base without it")

    stage = (lambda text: None) if quiet else ui.note
    return Listener(show, stage, started=stop.install, progress=progress(bars), should_stop=stop)


def _step(event: Any) -> str:
    note = "  skipped, not finite" if event.skipped else ""
    return (
        f"loss {event.loss:.4f}  lr {event.learning_rate:.2e}  {event.tokens_per_second:.0f} tok/s  "
        f"{ui.size(event.peak_memory)}{note}"
    )
