"""Our side over whole epochs of WikiSQL: what a setting changes about time, padding and the losses."""

from __future__ import annotations

from typing import Any

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter, Data
from mlx_lora.data.batch import steps_per_epoch
from mlx_lora.data.prepare import prepare
from mlx_lora.models.load import load
from mlx_lora.study.bench import PLAIN, measure
from tests.bench.sides.ours import RATE
from tests.fixed import fixed


def run(
    *, model: str, data: str, layers: int, count: int, epochs: int, packing: bool = False, **settings: Any
) -> dict[str, Any]:
    """`seconds` of every epoch after the first, and the mean loss of each epoch.

    Completion loss on the first `count` training rows; `settings` are the recipe's of `train`.
    """
    loaded = load(model)
    attach(loaded.model, Adapter(targets="all-linear", layers=layers))
    rows = prepare(data, Data(mask="completion", template="none"), loaded.tokenizer).train[:count]
    chosen = fixed(**{**PLAIN, "learning_rate": RATE, "cache_prefix": "off", "grad_checkpoint": "off", **settings})
    steps = steps_per_epoch(len(rows), batch_size=chosen.batch_size, grad_accumulation=1)
    measured = measure(loaded.model, rows, chosen, epochs * steps - 1, packing=packing)
    assert measured.finished is not None
    sums = [loss * tokens for loss, tokens in zip(measured.losses, measured.tokens, strict=True)]
    trained = sum(row.trained for row in rows)
    return {
        "seconds": measured.epochs(steps),
        "peak_bytes": measured.peak_bytes,
        "losses": [sum(sums[epoch * steps : (epoch + 1) * steps]) / trained for epoch in range(epochs)],
        "trainable_parameters": measured.finished.trainable_parameters,
        "trained_tokens": trained,
        "padding_fraction": measured.finished.padding_fraction,
        "rows": len(rows),
    }
