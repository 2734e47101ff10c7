"""Cross-entropy over the positions that carry loss, and only those.

    loss = Σ weight · nll / Σ weight

Sums are returned, never means: micro-batches, processes and evaluations add sums and divide once. Only the rows with
loss enter the output head, so the logits are (trained tokens, vocabulary) and never (batch, time, vocabulary).
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.data.batch import Batch
from mlx_lora.models.split import Split, logits_at

Arrays = tuple[mx.array, mx.array, mx.array, mx.array]
LossFunction = Callable[..., mx.array]


def as_arrays(batch: Batch) -> Arrays:
    """(inputs (B, T), positions (N,), targets (N,), weights (N,)) on the device; N counts positions with loss."""
    positions, targets, weights = batch.with_loss()
    return mx.array(batch.inputs), mx.array(positions), mx.array(targets), mx.array(weights)


def loss_function(model: nn.Module, split: Split | None) -> LossFunction:
    """A function (inputs, positions, targets, weights) -> Σ weight · nll, a float32 scalar."""

    logits = logits_at(model, split)

    def loss_sum(inputs: mx.array, positions: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
        return (negative_log_likelihood(logits(inputs, positions), targets) * weights).sum()

    return loss_sum


def negative_log_likelihood(logits: mx.array, targets: mx.array) -> mx.array:
    """−log softmax(logits)[target] for each row: logits (N, V), targets (N,) -> (N,), in float32."""
    logits = logits.astype(mx.float32)
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1).squeeze(-1)
    return mx.logsumexp(logits, axis=-1) - chosen
