"""What training costs on this machine: a step's seconds and memory, and the time of its matrix products alone.

Everything is measured by training on random tokens, so no data is needed. No other tools are measured. The result is a
list of measurements, each a number with a name and a unit.
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
# The optimizer isn't what is measured, so these are the cheapest settings in common use.
PLAIN: dict[str, Any] = {
    "optimizer": "adam", "schedule": "constant", "warmup": 0, "max_grad_norm": None, "learning_rate": 2e-4,
    "epochs": 1, "eval_every": None, "patience": None,
}  # fmt: skip
EPOCHS = 3


@dataclass
class Steps:
    """A run's measurements: `seconds` of every step except the first, which compiles, and the last; the loss, and the
    number of tokens with loss, of every step; peak bytes; the `Finished` event."""

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
    """All measurements: a step, its matrix products, epochs, a step by sequence length. Leaves the model bare."""
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
    """Median seconds, peak memory and trained tokens a second of a step, without and with gradient checkpointing."""
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
    """Train a new adapter for `steps` steps, each on the same random rows; it is detached at the end."""
    attach(loaded.model, adapter)
    rows = random_rows(loaded.model, work)
    train_settings = Train(**{"cache_prefix": "off", **PLAIN, **settings, "batch_size": work.rows})
    try:
        return measure(loaded.model, rows, train_settings, steps)
    finally:
        detach(loaded.model)
        mx.clear_cache()


def prefix(loaded: LoadedModel, work: Work, adapter: Adapter, *, batches: int = 4) -> Results:
    """Seconds of an epoch with adapters in the last quarter of layers; hidden states below them computed or cached.

    Empty for a model whose hidden states can't be cached.
    """
    last_quarter = adapter.model_copy(update={"layers": max(len(layers_of(loaded.model)) // 4, 1)})
    rows = random_rows(loaded.model, replace(work, rows=work.rows * batches))
    try:
        cached = epoch_seconds(loaded, rows, last_quarter, batch_size=work.rows, cache_prefix="on")
    except TrainingError:
        return []
    computed = epoch_seconds(loaded, rows, last_quarter, batch_size=work.rows)
    return [
        result("epoch, last quarter of layers", computed, "s"),
        result("epoch, last quarter of layers, states kept", cached, "s"),
        result("states computed / kept", computed / cached, "ratio"),
    ]


def packing(loaded: LoadedModel, work: Work, adapter: Adapter, *, batches: int = 4) -> Results:
    """Seconds of an epoch of rows with lengths from a quarter of `work.length` up to all of it, alone and packed.

    Empty for a model whose rows can't be packed.
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
    """Median seconds of the epochs after the first, with a new adapter that is detached at the end."""
    steps = steps_per_epoch(len(rows), batch_size=batch_size, grad_accumulation=1)
    train_settings = Train(
        **{"cache_prefix": "off", "grad_checkpoint": "off", **PLAIN, **settings, "batch_size": batch_size}
    )
    attach(loaded.model, adapter)
    try:
        measured = measure(loaded.model, rows, train_settings, EPOCHS * steps - 1, packing=packing)
        return median(measured.epochs(steps))
    finally:
        detach(loaded.model)
        mx.clear_cache()


def measure(model: nn.Module, rows: Sequence[Row], settings: Train, steps: int, **more: Any) -> Steps:
    """Train the attached adapter for `steps` timed steps; `more` goes to the trainer.

    Two more steps aren't timed: the first, which compiles, and the last. The trainer reports a step only after it has
    dispatched the next one, so the last two reports may come at the same time.
    """
    measured, reported = Steps(), []
    settings = settings.model_copy(update={"iters": steps + 2})
    for event in train(model, rows, [], settings, trunk=take_apart(model), **more):
        if isinstance(event, Step):
            reported.append(time.perf_counter())
            measured.losses.append(event.loss)
            measured.tokens.append(event.tokens)
            measured.peak_bytes = event.peak_memory
        elif isinstance(event, Finished):
            measured.finished = event
    measured.seconds = [end - start for start, end in pairwise(reported)][:-1]
    return measured


def random_rows(model: nn.Module, work: Work, *, seed: int = 0) -> list[Row]:
    """Rows of random tokens, one token more than positions, since the last token is only a target."""
    tokens = np.random.default_rng(seed).integers(0, vocabulary(model), (work.rows, work.length + 1), np.int32)
    weights = np.zeros(work.length + 1, np.float32)
    weights[-(work.trained // work.rows) :] = 1
    return [Row(row, weights) for row in tokens]


def floor(loaded: LoadedModel, work: Work, adapter: Adapter, *, seconds: float) -> Results:
    """Seconds of the matrix products alone of a step on `work`, and `seconds` divided by that.

    Empty for a model whose configuration doesn't have the usual keys for its width and its heads.
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
