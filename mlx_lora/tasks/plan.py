"""Whether a recipe fits this machine's memory, or another's, before a weight is loaded; and which one would.

Reads config.json, and the rows where they are there: a tokenizer needs no weights. Otherwise it plans for rows of
`max_seq_length` tokens with loss on all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import mlx.core as mx

from mlx_lora import files, paths, ui
from mlx_lora.adapters.attach import attach
from mlx_lora.config import Recipe, number
from mlx_lora.data.batch import padded
from mlx_lora.data.prepare import OnFile, Prepared, prepare, silent
from mlx_lora.data.rows import Row, lengths, trained
from mlx_lora.data.virtual import virtual_of
from mlx_lora.errors import ModelError, RecipeError, TrainingError
from mlx_lora.machine import device, limits
from mlx_lora.models.open import OpenModel, open_model
from mlx_lora.models.shapes import network, stored_dtype, summary
from mlx_lora.recipe import load_recipe
from mlx_lora.tasks.automatic import resolved
from mlx_lora.train import automatic
from mlx_lora.train.budget import learn
from mlx_lora.train.budget.choose import SMALLEST_STOPPED, Lengths, Plan, Way, plan
from mlx_lora.train.budget.costs import Costs, costs
from mlx_lora.train.events import Finished

# What a run must have been for its peak and its pace to be believed: smaller ones are mostly overhead.
ENOUGH_STEPS, ENOUGH_BYTES = 3, 64 << 20
# No row is suggested to be cut below this many tokens.
SHORTEST = 128
FEW_BITS = 4


@dataclass(frozen=True)
class Machine:
    """Where a run is planned for: a GPU or a processor, and how many bytes it gives."""

    gpu: bool
    limit: int


def plan_recipe(
    recipe: Recipe,
    *,
    rows: Lengths | None = None,
    memory_gb: float | None = None,
    gpu: bool | None = None,
    progress: OnFile = silent,
) -> Plan:
    """The plan of a recipe, with a suggestion where it doesn't fit; its data are read unless `rows` are known.

    For this machine, or one with `memory_gb` gigabytes; for its device, or a GPU or a processor as `gpu` says. Raises
    RecipeError without a model, ModelError for an architecture that isn't known, DataError for faulty rows.
    """
    if not recipe.model:
        raise RecipeError("the recipe doesn't say which model", hint="--model MODEL sets it")
    opened = open_model(recipe.model)
    config = summary(opened)
    limit = limits.limit_bytes(memory_gb=memory_gb, setting=recipe.train.memory_limit_gb)
    machine = Machine(device.on_gpu() if gpu is None else gpu, limit)
    rows = rows or read_lengths(recipe, opened, progress)
    reasons: tuple[str, ...] = ()
    if rows:
        recipe, chosen = resolved(recipe, opened, rows=len(rows.tokens), valid=len(rows.valid))
        reasons = chosen.sentences
    here = memory_gb is None and machine.gpu == device.on_gpu()
    made = replace(plan_shape(config, recipe, rows, machine, time_products=here), reasons=reasons)
    return made if made.fits else replace(made, suggestion=suggest(config, recipe, rows, machine))


def plan_rows(
    recipe: Recipe, model: OpenModel, prepared: Prepared, *, only: Way | None = None, smaller_than: Way | None = None
) -> Plan:
    """The plan of a run on its rows, on this machine; `only` and `smaller_than` as in `choose.plan`.

    Where it doesn't fit, `train.on_memory` decides. Raises TrainingError, saying what would fit and how to go on all
    the same, or returns the smallest plan as overruled.
    """
    config, rows = summary(model), lengths_of(prepared.train, prepared.valid)
    machine = Machine(device.on_gpu(), limits.limit_bytes(setting=recipe.train.memory_limit_gb))
    made = plan_shape(config, recipe, rows, machine, only=only, smaller_than=smaller_than)
    if made.fits or made.overruled:
        return made
    # a run that has begun is bound to its recipe
    instead = "free some memory" if only else _what_fits(suggest(config, recipe, rows, machine))
    raise TrainingError(over_limit(made), hint=f"{instead}; {override(made)}")


def over_limit(made: Plan) -> str:
    """Why a plan needs to be overruled, in words."""
    if made.fits:
        return SMALLEST_STOPPED
    needs, limit = ui.size(made.peak_memory_bytes), ui.size(made.limit_bytes)
    return f"training would take {needs}, and {limit} may be used"


def override(made: Plan) -> str:
    """How to train all the same."""
    enough = -(-made.peak_memory_bytes * 100 // limits.GIB) / 100
    return f"train.memory_limit_gb={enough:g} allows that much, train.on_memory=warn tries it without a limit"


def _what_fits(overrides: list[str] | None) -> str:
    return f"this would fit: {' '.join(overrides)}" if overrides else "choose a smaller model"


def learn_from(plan: Plan, finished: Finished, prepared: Prepared) -> None:
    """Let what a run measured correct the next plan, where it was what had been planned, and large enough to say much.

    A run that was stopped for taking too much teaches from its first step on: what it took is the least that it takes.
    """
    stopped = finished.stopped_by == "memory"
    longest = lengths(prepared.train).max()
    trained_most = bool((lengths(prepared.valid) <= longest).all())  # else an evaluation made the peak
    as_planned = finished.largest_micro_batch == plan.micro.positions and trained_most
    enough = finished.iters >= ENOUGH_STEPS and plan.peak_memory_bytes - plan.fixed >= ENOUGH_BYTES
    if not stopped and not (enough and as_planned):
        return
    pace = finished.seconds / finished.computed_tokens if enough else None
    # states that couldn't be kept as planned say nothing of the step
    measured = finished.peak_memory_bytes - finished.kept_states_bytes + plan.states_bytes
    with suppress(OSError):  # the adapter is stored: nothing was lost
        learn.remember(plan, measured, pace, stopped=stopped)


def plan_shape(
    config: dict[str, Any],
    recipe: Recipe,
    rows: Lengths | None,
    machine: Machine,
    *,
    only: Way | None = None,
    smaller_than: Way | None = None,
    time_products: bool = False,
) -> Plan:
    """The plan of a recipe over the base that `config` describes; rows of the longest allowed where there are none.

    Where no run has told how fast this machine is, `time_products` takes about a second to find out.
    """
    recipe = _with_epochs(recipe, rows)
    cost = costs_of(config, recipe, gpu=machine.gpu)
    made = _plan(cost, recipe, rows, machine.limit, only=only, smaller_than=smaller_than)
    if made.pace is None and time_products and (rows or recipe.train.iters):
        made = replace(made, pace=learn.pace_of_products(cost), pace_from="products")
    return replace(made, seconds=_seconds(recipe, rows, made))


def _with_epochs(recipe: Recipe, rows: Lengths | None) -> Recipe:
    """The recipe with a number of epochs, which is 1 where no rows tell how many there will be."""
    if recipe.train.epochs != "auto":
        return recipe
    epochs = automatic.epochs(recipe.train, len(rows.tokens))[0] if rows else 1
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": epochs})})


def costs_of(config: dict[str, Any], recipe: Recipe, *, gpu: bool) -> Costs:
    """What training that base with the recipe's adapter costs."""
    quantization = recipe.quantize.complete() if recipe.quantize else None
    model = network(config, quantization=quantization, gpu=gpu)
    attach(model, recipe.adapter, seed=recipe.seed)
    with files.refusing(ModelError, "what training this model costs can't be read off it"):
        return costs(model, recipe.train, dtype=stored_dtype(config) if gpu else mx.float32, gpu=gpu)


def _plan(
    cost: Costs,
    recipe: Recipe,
    rows: Lengths | None,
    limit: int,
    *,
    only: Way | None = None,
    smaller_than: Way | None = None,
) -> Plan:
    return plan(
        cost, rows or guessed(recipe), recipe.train, limit,
        packing=recipe.data.packing, experience=learn.experience, only=only, smaller_than=smaller_than,
    )  # fmt: skip


def read_lengths(recipe: Recipe, model: OpenModel, progress: OnFile = silent) -> Lengths | None:
    """The lengths of the recipe's rows, or None where there are none to read."""
    if not recipe.data.path or paths.existing(recipe.data.path) is None:
        return None
    virtual = virtual_of(recipe.adapter)
    prepared = prepare(
        recipe.data.path, recipe.data, model.tokenizer, seed=recipe.seed, progress=progress, virtual=virtual
    )
    return lengths_of(prepared.train, prepared.valid)


def lengths_of(rows: Sequence[Row], valid: Sequence[Row] = ()) -> Lengths:
    """What a plan has to know of training and validation rows."""
    return Lengths(lengths(rows).tolist(), int(trained(rows).max()), lengths(valid).tolist())


def guessed(recipe: Recipe) -> Lengths:
    """One step of rows of the longest length that the recipe allows, with loss on every token."""
    rows = recipe.train.batch_size * recipe.train.grad_accumulation
    return Lengths([longest(recipe)] * rows, recipe.data.max_seq_length - 1)


def longest(recipe: Recipe) -> int:
    """Tokens of the longest row that the recipe allows, virtual ones included."""
    virtual = virtual_of(recipe.adapter)
    return recipe.data.max_seq_length + (virtual.count if virtual else 0)


def suggest(config: dict[str, Any], recipe: Recipe, rows: Lengths | None, machine: Machine) -> list[str] | None:
    """Overrides that make the recipe fit, harming least what it learns: None where nothing does."""
    known: dict[str, Costs] = {}
    for overrides in _overrides(config, recipe, rows):
        try:
            changed = load_recipe(None, overrides, settings=recipe.model_dump())
        except RecipeError:  # as 4 bits of a mode that has 8
            continue
        key = changed.model_dump_json(include={"quantize", "adapter"})
        if key not in known:
            known[key] = costs_of(config, changed, gpu=machine.gpu)
        changed = _with_epochs(changed, rows)
        if _plan(known[key], changed, _shortened(rows, changed), machine.limit).fits:
            return overrides
    return None


def _overrides(config: dict[str, Any], recipe: Recipe, rows: Lengths | None) -> Iterator[list[str]]:
    """From what only takes time, over fewer bits and shorter rows, to fewer layers; each with all that comes before."""
    again: list[list[str]] = [[]] + [["train.grad_checkpoint=on"]] * (recipe.train.grad_checkpoint == "off")
    packed = config.get("quantization") or (recipe.quantize and recipe.quantize.complete()["bits"] <= FEW_BITS)
    bits: list[list[str]] = [[]] + [[f"quantize.bits={FEW_BITS}"]] * (not packed)
    for layers, length, fewer, once_more in product(_layers(config, recipe), _cuts(recipe, rows), bits, again):
        if overrides := once_more + fewer + length + layers:
            yield overrides


def _cuts(recipe: Recipe, rows: Lengths | None) -> list[list[str]]:
    """Rows as they are, then cut to half, a quarter, … of the longest; an ending lost is worse than a beginning."""
    longest = max(rows.tokens) if rows else recipe.data.max_seq_length
    shorter: list[list[str]] = [[]]
    length = 1 << (longest - 1).bit_length() - 1
    while length >= SHORTEST:
        cut = [f"data.max_seq_length={length}"]
        shorter.append(cut + ["data.too_long=truncate-start"] * (recipe.data.too_long == "error"))
        length //= 2
    return shorter


def _layers(config: dict[str, Any], recipe: Recipe) -> list[list[str]]:
    """The adapter's layers as they are, then half of them, a quarter, … the last one alone."""
    inner = config.get("text_config") or {}
    total = config.get("num_hidden_layers", inner.get("num_hidden_layers", 1))
    now = {"all": total}.get(str(recipe.adapter.layers), recipe.adapter.layers)
    if not isinstance(now, int):  # a list was chosen with care
        return [[]]
    fewer = []
    while now > 1:
        now //= 2
        fewer.append([f"adapter.layers={now}"])
    return [[], *fewer]


def _shortened(rows: Lengths | None, recipe: Recipe) -> Lengths | None:
    """Rows as the recipe's `max_seq_length` leaves them."""
    most = longest(recipe)
    return rows and Lengths([min(tokens, most) for tokens in rows.tokens], min(rows.trained, most - 1))


def _seconds(recipe: Recipe, rows: Lengths | None, made: Plan) -> float | None:
    """How long training will take, without its evaluations: where the pace is known, and rows tell the work."""
    pace, steps = made.pace, recipe.train.iters
    per_step = recipe.train.batch_size * recipe.train.grad_accumulation
    if pace is None or (rows is None and steps is None):
        return None
    tokens = (rows or guessed(recipe)).tokens
    positions = sum(padded(length - 1) for length in tokens)
    passes = number(recipe.train.epochs) if steps is None else steps * per_step / len(tokens)
    return pace * made.work * positions * passes
