"""Σ nll of each row, out of the forward passes that the mean is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.data.batch import by_length
from mlx_lora.data.rows import Row
from mlx_lora.models import finite
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.serve.engine import Engine
from mlx_lora.train.objectives.likelihood import Loss, as_arrays

BATCH = 8


def summed(
    model: nn.Module, rows: Sequence[Row], on_row: Callable[[], None] = lambda: None
) -> tuple[float, np.ndarray]:
    """(mean loss per token, Σ nll of each row (rows,) float64), in nats; rows have their virtual tokens.

    Raises NotFinite.
    """
    loss_sum = Loss(take_apart(model))
    total, tokens, sums = 0.0, 0, np.zeros(len(rows))
    for batch in by_length(rows, BATCH):
        arrays = as_arrays(batch)
        loss, each = loss_sum.with_each(arrays)
        mx.eval(loss, each)
        if not math.isfinite(float(loss.item())):
            raise finite.error(model, mx.array(batch.inputs))
        total += float(loss.item())
        tokens += batch.trained
        lines = np.array(arrays["positions"]) // batch.inputs.shape[1]
        sums[[row for (row,) in batch.lines]] = np.bincount(lines, np.array(each), len(batch.lines))
        for _ in batch.inputs:
            on_row()
    return total / tokens, sums


def row_losses(
    engine: Engine, rows: Sequence[Row], on_row: Callable[[], None] = lambda: None
) -> tuple[float, np.ndarray]:
    """`summed` with the attached adapter of an engine, if any, and its virtual tokens. Raises NotFinite."""
    virtual = engine.virtual
    return summed(engine.loaded.model, [virtual.row(row) for row in rows] if virtual else rows, on_row)
