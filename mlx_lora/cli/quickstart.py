"""quickstart: what a newcomer runs first."""

from __future__ import annotations

from contextlib import ExitStack

import typer

from mlx_lora import ui
from mlx_lora.cli.options import Json

NEXT = """
With your own files:
  mlx-lora pull mlx-community/Qwen3-0.6B-4bit --name qwen
  mlx-lora data check my-data/ --model qwen
  mlx-lora train --model qwen --data my-data/ --name mine
  mlx-lora chat --model qwen --adapter mine"""


def register(app: typer.Typer) -> None:
    app.command()(quickstart)


def quickstart(json: Json = False) -> None:
    """Quantize the embedded base, train three adapters, swap them, fuse one. Minutes, no network."""
    from mlx_lora.cli.live import listener
    from mlx_lora.cli.train import StopSignal
    from mlx_lora.tasks.quickstart import quickstart as run

    with ExitStack() as stack:
        stop = StopSignal(stack)

        def stage(text: str) -> None:
            stack.close()  # the training before is over, and so is its way of handling signals
            ui.note(text)

        try:
            outcome = run(lambda: listener(stack, stop, quiet=True), stage)
        except KeyboardInterrupt:
            raise typer.Exit(code=stop.code or 130) from None
    if json:
        ui.as_json(outcome.as_dict())
        return
    for task, question, base, adapter in outcome.samples:
        ui.result(task)
        for label, text in (("asked", question), ("base", base), ("adapter", adapter)):
            ui.result(f"  {label:8} {_line(text)}")
        ui.result()
    rows = [
        (task["name"], f"{task['base_exact_match']:.2f}", f"{task['adapter_exact_match']:.2f}",
         ui.size(task["adapter_bytes"]), f"{task['train_seconds']:.0f} s")
        for task in outcome.tasks
    ]  # fmt: skip
    ui.table(["task", "base exact match", "adapter exact match", "adapter", "training"], rows)
    matches = "gives the same answers" if outcome.fused_matches else "answers differently"
    ui.result()
    ui.result(
        f"one base of {ui.size(outcome.base_bytes)} in 4 bits; swapping takes {outcome.swap_milliseconds:.1f} ms; "
        f"the fused model {matches}"
    )
    for line in NEXT.splitlines():
        ui.result(line)


def _line(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 200 else f"{flat[:199]}…"
