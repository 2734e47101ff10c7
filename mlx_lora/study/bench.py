"""What training costs here: seconds and memory of a step, and the floor that its bare matrix products set.

Everything is measured on random tokens through the trainer itself, so no data is needed; nothing is compared with
other tools. A measurement is a number with a name and a unit, and what is reported is a list of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.adapters.attach import attach, detach
from mlx_lora.config import Adapter, Train
from mlx_lora.data.batch import steps_per_epoch
from mlx_lora.data.rows import Row
from mlx_lora.errors import TrainingError
from mlx_lora.models.load import LoadedModel
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.study.products import Loss, Work, products, text_config, time_product, vocabulary
from mlx_lora.train.events import Finished, Step
from mlx_lora.train.trainer import train

Results = list[dict[str, Any]]

LENGTHS = (128, 512, 1024, 2048)
# The optimizer is never the point here: the cheapest settings that people use.
PLAIN: dict[str, Any] = {"optimizer": "adam", "schedule": "constant", "warmup": 0, "max_grad_norm": None}
EPOCHS = 3


@dataclass
class Steps:
    """What a run measured: `seconds` of each step but the first, which compiles, and the last; losses and tokens with
    loss of every step; peak bytes; what `Finished` said."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    peak_bytes: int = 0
    finished: Finished | None = None

    @property
    def median(self) -> float:
        return median(self.seconds)

    def epochs(self, steps: int) -> list[float]:
        """Seconds of every epoch after the first, of `steps` steps each."""
        later = self.seconds[steps - 1 :]
        return [sum(later[start : start + steps]) for start in range(0, len(later), steps)]


def result(name: str, value: float, unit: str) -> dict[str, Any]:
    """One measurement."""
    return {"name": name, "value": value, "unit": unit}


def bench(
    loaded: LoadedModel,
    work: Work,
    *,
    adapter: Adapter | None = None,
    lengths: Sequence[int] = LENGTHS,
    steps: int = 3,
    stage: Callable[[str], None] = lambda text: None,
) -> Results:
    """Everything that needs no data: a step, its floor, and a step by sequence length. Leaves the model bare."""
    adapter = adapter or Adapter()
    stage("a training step, without and with gradient checkpointing")
    results = step(loaded, work, adapter, steps=steps)
    stage("the bare matrix products of that step")
    results += floor(loaded, work, adapter, seconds=results[0]["value"])
    stage("epochs with adapters in the last layers, hidden states below them computed or kept")
    results += prefix(loaded, work, adapter)
    stage("epochs of rows of several lengths, alone and packed")
    results += packing(loaded, work, adapter)
    for length in lengths:
        stage(f"a row of {length} positions")
        results += by_length(loaded, [length], adapter, loss=work.loss, steps=steps)
    return results


def step(loaded: LoadedModel, work: Work, adapter: Adapter, *, steps: int = 3) -> Results:
    """Median seconds of a training step, its peak memory and its trained tokens a second, both ways."""
    results: Results = []
    for checkpoint in ("off", "on"):
        measured = run(loaded, work, adapter, steps=steps, grad_checkpoint=checkpoint)
        suffix = ", checkpointing" if checkpoint == "on" else ""
        results += [
            result(f"step{suffix}", measured.median, "s"),
            result(f"trained tokens{suffix}", work.trained / measured.median, "tokens/s"),
            result(f"peak memory{suffix}", measured.peak_bytes, "bytes"),
        ]
    return results


def by_length(
    loaded: LoadedModel, lengths: Sequence[int], adapter: Adapter, *, loss: Loss = "completion", steps: int = 3
) -> Results:
    """Seconds and peak memory of a step on one row of each length, without and with gradient checkpointing."""
    results: Results = []
    for length in lengths:
        for checkpoint in ("off", "on"):
            measured = run(loaded, Work(1, length, loss), adapter, steps=steps, grad_checkpoint=checkpoint)
            suffix = f", {length} positions{', checkpointing' if checkpoint == 'on' else ''}"
            results.append(result(f"step{suffix}", measured.median, "s"))
            results.append(result(f"peak memory{suffix}", measured.peak_bytes, "bytes"))
    return results


def run(loaded: LoadedModel, work: Work, adapter: Adapter, *, steps: int, **settings: Any) -> Steps:
    """Train a fresh adapter on the same random rows in each of `steps` steps; the base stays as it was."""
    attach(loaded.model, adapter)
    rows = random_rows(loaded.model, work)
    chosen = Train(**{"cache_prefix": "off", **PLAIN, **settings, "batch_size": work.rows})
    try:
        return measure(loaded.model, rows, chosen, steps)
    finally:
        detach(loaded.model)
        mx.clear_cache()


def prefix(loaded: LoadedModel, work: Work, adapter: Adapter, *, batches: int = 4) -> Results:
    """Seconds of an epoch with adapters in the last quarter of layers, states below computed anew or kept.

    Nothing for a model whose states can't be kept.
    """
    last = adapter.model_copy(update={"layers": max(len(layers_of(loaded.model)) // 4, 1)})
    rows = random_rows(loaded.model, replace(work, rows=work.rows * batches))
    try:
        kept = epoch_seconds(loaded, rows, last, batch_size=work.rows, cache_prefix="on")
    except TrainingError:
        return []
    computed = epoch_seconds(loaded, rows, last, batch_size=work.rows)
    return [
        result("epoch, last quarter of layers", computed, "s"),
        result("epoch, last quarter of layers, states kept", kept, "s"),
        result("states computed / kept", computed / kept, "ratio"),
    ]


def packing(loaded: LoadedModel, work: Work, adapter: Adapter, *, batches: int = 4) -> Results:
    """Seconds of an epoch of rows between a quarter of the length and all of it, alone and packed.

    Nothing for a model whose rows can't be packed.
    """
    lengths = np.random.default_rng(0).integers(max(work.length // 4, 4), work.length + 1, work.rows * batches)
    rows = [random_rows(loaded.model, replace(work, rows=1, length=int(length)))[0] for length in lengths]
    try:
        packed = epoch_seconds(loaded, rows, adapter, batch_size=work.rows, packing=True)
    except TrainingError:
        return []
    alone = epoch_seconds(loaded, rows, adapter, batch_size=work.rows)
    return [
        result("epoch, rows of several lengths", alone, "s"),
        result("epoch, rows of several lengths, packed", packed, "s"),
        result("alone / packed", alone / packed, "ratio"),
    ]


def epoch_seconds(
    loaded: LoadedModel,
    rows: Sequence[Row],
    adapter: Adapter,
    *,
    batch_size: int,
    packing: bool = False,
    **settings: Any,
) -> float:
    """Median seconds of the epochs after the first, of a fresh adapter; the base stays as it was."""
    steps = steps_per_epoch(len(rows), batch_size=batch_size, grad_accumulation=1)
    chosen = Train(**{"cache_prefix": "off", "grad_checkpoint": "off", **PLAIN, **settings, "batch_size": batch_size})
    attach(loaded.model, adapter)
    try:
        return median(measure(loaded.model, rows, chosen, EPOCHS * steps - 1, packing=packing).epochs(steps))
    finally:
        detach(loaded.model)
        mx.clear_cache()


def measure(model: nn.Module, rows: Sequence[Row], settings: Train, steps: int, **more: Any) -> Steps:
    """Train what is attached for `steps` timed steps; `more` goes to the trainer.

    One step more before them, to compile, and one after them: the trainer reports a step only once it has dispatched
    the next, so the last two reports may come together.
    """
    measured, reported = Steps(), []
    chosen = settings.model_copy(update={"iters": steps + 2})
    for event in train(model, rows, [], chosen, trunk=take_apart(model), **more):
        if isinstance(event, Step):
            reported.append(time.perf_counter())
            measured.losses.append(event.loss)
            measured.tokens.append(event.tokens)
            measured.peak_bytes = event.peak_memory
        elif isinstance(event, Finished):
            measured.finished = event
    measured.seconds = [after - before for before, after in pairwise(reported)][:-1]
    return measured


def random_rows(model: nn.Module, work: Work, *, seed: int = 0) -> list[Row]:
    """Rows of random tokens: one more than positions, since the last is only a target."""
    tokens = np.random.default_rng(seed).integers(0, vocabulary(model), (work.rows, work.length + 1), np.int32)
    weights = np.zeros(work.length + 1, np.float32)
    weights[-(work.trained // work.rows) :] = 1
    return [Row(row, weights) for row in tokens]


def floor(loaded: LoadedModel, work: Work, adapter: Adapter, *, seconds: float) -> Results:
    """Seconds of the bare matrix products of a step on `work`, and how many times that `seconds` is.

    Nothing for a model whose configuration doesn't name its width and its heads as most do.
    """
    if not {"hidden_size", "num_attention_heads"} <= text_config(loaded.config).keys():
        return []
    attach(loaded.model, adapter)
    try:
        counted = products(loaded.model, loaded.config, work)
    finally:
        detach(loaded.model)
    total = sum(times * time_product(product, loaded.dtype) for product, times in counted.items())
    operations = sum(times * product.operations for product, times in counted.items())
    return [
        result("matrix products alone", total, "s"),
        result("multiplications and additions", operations / total, "1/s"),
        result("step / matrix products", seconds / total, "ratio"),
    ]
