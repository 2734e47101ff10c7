"""Our side on Qwen3.5-0.8B's shape: whole training steps of a model most of whose layers keep a state."""

from __future__ import annotations

from statistics import median
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter
from mlx_lora.study.bench import measure
from tests.bench.sides import rows as plain
from tests.bench.sides.ours import rows_of
from tests.bench.sides.random_models import qwen3_5
from tests.fixed import fixed

VOCABULARY = 8192


def run(*, length: int, checkpoint: str, layers: int = 24, steps: int = 2) -> dict[str, Any]:
    """Steps of one row of `length` positions, loss on its last quarter, the default adapter."""
    model = qwen3_5(VOCABULARY, layers)
    base = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    attach(model, Adapter())
    mx.clear_cache()
    rows = rows_of(plain.random(VOCABULARY, 1, length, "completion"))
    settings = fixed(batch_size=1, grad_checkpoint=checkpoint, optimizer="adam")
    measured = measure(model, rows, settings, steps)
    return {
        "seconds": [median(measured.seconds)],
        "peak_bytes": measured.peak_bytes,
        "base_bytes": base,
        "losses": measured.losses,
        "layers": layers,
    }
