"""Our side on LLaMA-7B's shape, where a second step would only take time."""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.train.events import Step
from mlx_lora.train.trainer import train
from tests.bench.sides import rows as plain
from tests.bench.sides.ours import rows_of
from tests.bench.sides.random_models import llama_7b
from tests.fixed import fixed


def run(*, length: int, layers: int) -> dict[str, Any]:
    """One step on one row, loss on its last quarter."""
    model = llama_7b(layers)
    base = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    attach(model, Adapter(targets="attention"))
    rows = rows_of(plain.random(32000, 1, length, "completion"))
    settings = fixed(iters=1, batch_size=1, grad_checkpoint="on", optimizer="adam")
    trunk = take_apart(model)
    mx.clear_cache()
    began = time.perf_counter()
    (step,) = (event for event in train(model, rows, [], settings, trunk=trunk) if isinstance(event, Step))
    return {
        "seconds": [time.perf_counter() - began],
        "peak_bytes": step.peak_memory,
        "base_bytes": base,
        "losses": [step.loss],
        "layers": layers,
        "trained_tokens": step.tokens,
    }
