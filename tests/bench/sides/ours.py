"""Our side: mlx_lora's own trainer, through its public functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter, Data
from mlx_lora.data.prepare import prepare
from mlx_lora.data.rows import Row
from mlx_lora.models.load import load
from mlx_lora.study.bench import PLAIN, measure
from tests.bench.sides import rows as plain
from tests.fixed import fixed

RATE = 1e-4
# The lowest adapted layer is the sixteenth from the end, as mlx_lm has it by default.
LAYERS = 16


def encode(*, model: str, data: str, mask: str, tokens: int, count: int, out: str) -> dict[str, Any]:
    """Write the first `count` rows of exactly `tokens` tokens where every side can read them."""
    prepared = prepare(data, Data(mask=mask, template="none"), load(model).tokenizer)  # type: ignore[arg-type]
    chosen = [row for row in prepared.train if len(row) == tokens][:count]
    assert len(chosen) == count, f"only {len(chosen)} rows have {tokens} tokens"
    Path(out).write_text(json.dumps([[row.tokens.tolist(), row.weights.tolist()] for row in chosen]))
    return {}


def rows_of(found: list[plain.PlainRow]) -> list[Row]:
    return [Row(np.array(row.tokens, np.int32), np.array(row.weights, np.float32)) for row in found]


def run(*, model: str, rows: str, steps: int, **settings: Any) -> dict[str, Any]:
    """The same rows in every step: rank 8 on every linear of the last layers, Adam where `settings` don't say else."""
    loaded = load(model)
    attach(loaded.model, Adapter(targets="all-linear", layers=LAYERS))
    return train(loaded.model, plain.read(rows), steps, **settings)


def length(*, model: str, length: int, steps: int, grad_checkpoint: str, mask: str = "completion") -> dict[str, Any]:
    """One random row of `length` positions."""
    loaded = load(model)
    attach(loaded.model, Adapter(targets="all-linear", layers=LAYERS))
    rows = plain.random(loaded.config["vocab_size"], 1, length, mask)
    return train(loaded.model, rows, steps, grad_checkpoint=grad_checkpoint)


def train(model: nn.Module, rows: list[plain.PlainRow], steps: int, **settings: Any) -> dict[str, Any]:
    """`steps` timed steps over all of `rows`, with nothing that the other side doesn't do."""
    chosen = fixed(**{**PLAIN, "learning_rate": RATE, "cache_prefix": "off", **settings, "batch_size": len(rows)})
    measured = measure(model, rows_of(rows), chosen, steps)
    return {
        "seconds": measured.seconds,
        "peak_bytes": measured.peak_bytes,
        "losses": measured.losses,
        "trainable_parameters": sum(array.size for _, array in tree_flatten(model.trainable_parameters())),
        "trained_tokens": measured.tokens[0],
        "base_bytes": sum(array.nbytes for _, array in tree_flatten(model.parameters())),
    }


def vocabulary(*, vocabulary: int, steps: int, rows: int = 4, length: int = 512) -> dict[str, Any]:
    """A Gemma-3-like model with random weights, loss on every token."""
    from tests.bench.sides.random_models import gemma3

    model = gemma3(vocabulary)
    attach(model, Adapter(targets="all-linear"))
    mx.eval(model.parameters())
    return train(model, plain.random(vocabulary, rows, length, "all"), steps)
