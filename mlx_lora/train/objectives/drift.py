"""How far a tuned model has moved from its base on some rows: KL(base ‖ tuned), beside the loss.

    Σ over the positions with loss of  Σ_v p_base(v) · (log p_base(v) − log p_tuned(v))        nats

The KL from the base on a task's own rows predicts what else is forgotten (RL's Razor, arXiv 2509.04259). The base is
the same model with its adapter taken out while the function runs: no second model is in memory, and no array changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.attach import attached, detach, put
from mlx_lora.train.objectives.likelihood import Arrays, Loss


class Drift:
    """[Σ weight · nll, Σ KL(base ‖ tuned)] of a batch's arrays, float32 (2,); the KL counts positions with a weight."""

    def __init__(self, model: nn.Module, loss: Loss):
        self._model, self._loss = model, loss

    def __call__(self, arrays: Arrays) -> mx.array:
        """Run the tuned model, then the base. Logits are made a tile at a time, as for the loss."""
        hidden = self._loss.hidden(arrays)
        key = "inputs" if "inputs" in arrays else "states"
        (entering,) = mx.depends([arrays[key]], [hidden])  # one after another: their activations aren't held together
        with without_adapter(self._model):
            before = self._loss.hidden({**arrays, key: entering})
        sums = mx.zeros(2)
        for tile in self._loss.tiles(hidden):
            after_part, before_part = mx.depends([hidden[tile], before[tile]], [sums])
            tuned = log_probabilities(self._loss.head(after_part))
            with without_adapter(self._model):
                base = log_probabilities(self._loss.head(before_part))
            weights = arrays["weights"][tile]
            nll = -mx.take_along_axis(tuned, arrays["targets"][tile][:, None], axis=-1).squeeze(-1)
            kl = (mx.exp(base) * (base - tuned)).sum(axis=-1)
            sums = sums + mx.stack([(nll * weights).sum(), mx.where(weights != 0, kl, 0.0).sum()])
        return sums


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """While the block runs, `model` is its base; then the same wrappers are back at their places."""
    wrappers = attached(model)
    detach(model)
    try:
        yield
    finally:
        put(model, wrappers)


def log_probabilities(logits: mx.array) -> mx.array:
    """log softmax of logits (N, V), in float32."""
    rows = logits.astype(mx.float32)
    return rows - mx.logsumexp(rows, axis=-1, keepdims=True)
