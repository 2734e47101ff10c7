"""plan."""

from __future__ import annotations

from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_lora import ui
from mlx_lora.cli.options import Base, Json, KvBits, RecipeWords, Rows, progress
from mlx_lora.cli.settings import RecipeCommand
from mlx_lora.errors import RecipeError

if TYPE_CHECKING:
    from mlx_lora.train.budget.choose import Plan

Device = StrEnum("Device", ["cpu", "gpu"])


def register(app: typer.Typer) -> None:
    app.command(cls=RecipeCommand)(plan)


def plan(
    settings: RecipeWords = None,
    model: Base = None,
    data: Rows = None,
    memory_gb: Annotated[
        float | None, typer.Option("--memory-gb", min=0.1, help="Plan for a machine with this much memory, in GiB.")
    ] = None,
    device: Annotated[
        Device | None, typer.Option("--device", help="Plan for a Mac's GPU, or for a processor; this one's by default.")
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Plan for answering with it instead of training it.")] = False,
    kv_bits: KvBits = None,
    json: Json = False,
) -> None:
    """Say what training will take in memory and time before anything is loaded, and what would fit."""
    from mlx_lora.recipe import load_recipe
    from mlx_lora.tasks.plan import plan_recipe

    if serve:
        return _plan_serving(model, settings, data, memory_gb, device, kv_bits, json)
    if kv_bits is not None:
        raise RecipeError("--kv-bits is about answering", hint="--serve --kv-bits 8")
    words = list(settings or [])
    file = Path(words.pop(0)) if words and "=" not in words[0] else None
    given = {key: value for key, value in (("model", model), ("data.path", data)) if value is not None}
    recipe = load_recipe(file, words, settings=given)
    with ExitStack() as stack:
        gpu = None if device is None else device == Device.gpu
        made = plan_recipe(recipe, memory_gb=memory_gb, gpu=gpu, progress=progress(stack))
    if json:
        ui.as_json(made.as_dict())
    else:
        _show(made)


def _plan_serving(
    model: str | None,
    settings: list[str] | None,
    data: str | None,
    memory_gb: float | None,
    device: Device | None,
    kv_bits: int | None,
    json: bool,
) -> None:
    from mlx_lora.tasks.plan_serving import plan_serving

    if settings or data:
        raise RecipeError("--serve plans for a base alone, without recipe and data", hint="--serve --model MODEL")
    made = plan_serving(
        model, memory_gb=memory_gb, gpu=None if device is None else device == Device.gpu, kv_bits=kv_bits
    )
    if json:
        return ui.as_json(made.as_dict())
    ui.table(["part", "memory"], [(part.replace("_", " "), ui.size(size)) for part, size in made.parts.items()])
    ui.result(
        f"peak {ui.size(made.peak)} of {ui.size(made.limit)}: {'fits' if made.fits else 'has no room for a request'}"
    )
    ui.result(f"{made}")


def _show(made: Plan) -> None:
    from mlx_lora.tasks.plan import override

    facts = made.as_dict()
    ui.table(["part", "memory"], [*((part, ui.size(size)) for part, size in facts["parts"].items())])
    answer = "fits" if made.fits else "doesn't fit"
    ui.result(f"peak {ui.size(made.peak_memory_bytes)} of {ui.size(made.limit_bytes)}: {answer}")
    ui.result(
        f"micro-batches of up to {made.micro.lines} × {made.micro.width} positions, gradient checkpointing "
        f"{facts['grad_checkpoint']}"
    )
    if made.seconds is not None:
        known_from = {
            "runs": "going by earlier runs on this machine",
            "products": "going by half a second of products timed on this machine; the first run tells it better",
        }
        ui.result(f"about {ui.duration(made.seconds)}, {known_from[made.pace_from or 'runs']}")
    else:
        ui.result("how long it takes is not known yet: it depends on the rows (--data PATH), and on the machine")
    for reason in made.reasons:
        ui.result(reason)
    if made.suggestion:
        ui.result(f"would fit: {' '.join(made.suggestion)}")
    elif not made.fits:
        ui.result("no recipe over this base fits: choose a smaller one")
    if not made.fits:
        ui.result(f"all the same: {override(made)}")
