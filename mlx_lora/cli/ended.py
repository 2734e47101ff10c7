"""The end of a training run on the screen: figures, a plain sentence, a few answers, and what can be done next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from mlx_lora import paths, ui
from mlx_lora.errors import MlxLoraError, TrainingError

if TYPE_CHECKING:
    from mlx_lora.cli.train import StopSignal
    from mlx_lora.tasks.train import TrainedRun

INTERRUPTED = 130


def show(run: TrainedRun, *, json: bool, samples: bool) -> None:
    """Show how a run ended; with `samples` also a few answers, on stderr, which Ctrl-C cuts short."""
    from dataclasses import asdict

    from mlx_lora.store.run import read_folder_or_damaged
    from mlx_lora.study.ending import ending

    found = ending(read_folder_or_damaged(paths.room("runs", run.name)))
    if not json:
        _show_figures(run.as_dict())
        if found:
            ui.result(found.text)
    cut = samples and run.finished.stopped_by not in ("interrupted", "memory", "nonfinite") and not _show_samples(run)
    if json:
        ui.as_json(run.as_dict() | {"ending": asdict(found) if found else None})
    else:
        ui.result(str(run.path))
    if cut:
        raise typer.Exit(code=INTERRUPTED)


def _show_figures(result: dict[str, Any]) -> None:
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


def _show_samples(run: TrainedRun) -> bool:
    """Show a few answers beside the wanted ones; False where Ctrl-C cut that short."""
    from mlx_lora.tasks.samples import of_run

    try:
        with ui.slow_bar("answering validation rows") as update:
            samples = of_run(run, on_token=update)
    except KeyboardInterrupt:
        ui.note("no answers then; the adapter is stored")
        return False
    except (MlxLoraError, OSError, RuntimeError) as fault:  # RuntimeError: MLX's, where memory is short
        ui.note(f"no answers: {fault}; the adapter is stored")
        return True
    for sample in samples:
        for line in sample.lines():
            ui.err.print(ui.one_line(line))
    return True


def check_end(run: TrainedRun, stop: StopSignal) -> None:
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
