"""What a screen shows of a run while it trains: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlx_lora import panel, ui
from mlx_lora.cli.options import progress

if TYPE_CHECKING:
    from mlx_lora.cli.train import StopSignal
    from mlx_lora.tasks.train import Listener


def listener(stack: ExitStack, stop: StopSignal, *, quiet: bool = False, live: bool = False) -> Listener:
    """A screen for one training run. `live` is a view with curves where the terminal can show it; else there is a bar.

    Where stderr is no terminal, a plain line now and then takes the bar's place. `quiet` is for one of
    several trainings, whose ending isn't shown: what comes before it is left out, and a warning says if it made worse.
    """
    from mlx_lora.tasks.train import Listener
    from mlx_lora.train.events import Evaluated, Finished, Note, Step

    bars = stack.enter_context(ExitStack())
    show_step: Callable[[Any], None] | None = None
    view = _live_view() if live and panel.possible() else None
    untrained: float | None = None

    def show(event: Any) -> None:
        nonlocal show_step, untrained
        if view:
            view.hear(event)
        if isinstance(event, Step):
            if show_step is None:
                bars.close()
                show_step = _painting(bars, view) if view else _bar(bars, event)
            show_step(event)
        elif isinstance(event, Evaluated):
            untrained = event.loss if not event.step else untrained
            ui.note(f"step {event.step}: validation loss {event.loss:.4f}{' (best)' if event.best else ''}")
        elif isinstance(event, Note):
            ui.note(event.text)
        elif isinstance(event, Finished):
            bars.close()
            if quiet and untrained is not None and (event.best_valid_loss or 0) > untrained:  # else its ending says so
                ui.warning("the adapter is worse on the validation rows than the base without it")

    def started() -> None:
        stop.install()
        _replace_bar(bars)

    stage = (lambda text: None) if quiet else ui.note
    heard = Listener(show, stage, started=started, progress=progress(bars), should_stop=stop)
    return replace(heard, planned=view.planned, sampled=view.sampled) if view else heard


def _replace_bar(bars: ExitStack) -> None:
    """Say what is going on until the first step; the bar of what was read last would stay."""
    if panel.possible():
        bars.close()
        bars.enter_context(ui.working("validating, before the first step"))


def _live_view() -> Any:
    import mlx.core as mx

    from mlx_lora.report.live import LiveView

    return LiveView(mx.get_active_memory)


def _painting(bars: ExitStack, view: Any) -> Callable[[Any], None]:
    ask = bars.enter_context(panel.panel(view.lines))
    return lambda event: ask()


def _bar(bars: ExitStack, first: Any) -> Callable[[Any], None]:
    advance = bars.enter_context(ui.bar("training", first.steps))
    shown = 0

    def show(event: Any) -> None:
        nonlocal shown
        advance(event.step - shown, _step(event))
        shown = event.step

    return show


def _step(event: Any) -> str:
    note = "  skipped, not finite" if event.skipped else ""
    return (
        f"loss {event.loss:.4f}  lr {event.learning_rate:.2e}  {event.tokens_per_second:.0f} tok/s  "
        f"{ui.size(event.peak_memory)}{note}"
    )
