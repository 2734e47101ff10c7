"""Drift against numpy: KL in the right direction, on the positions with loss, with an adapter and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.adapters.attach import attached, build
from mlx_lora.config import Adapter, Data
from mlx_lora.data.rows import Row
from mlx_lora.models.load import LoadedModel
from mlx_lora.serve.engine import Engine
from mlx_lora.study.drift import Drift, spaced
from mlx_lora.study.evaluate import questions


def changed(engine: Engine, name: str, **settings: Any) -> None:
    """An adapter with random factors, as if it had learned something."""
    wrappers = build(engine.loaded.model, Adapter(rank=4, **settings))
    draw = np.random.default_rng(0)
    for wrapper in wrappers.values():
        wrapper.freeze()
        for key in wrapper.adapter_params():
            wrapper[key] = mx.array(draw.normal(0, 0.1, wrapper[key].shape).astype(np.float32))
    engine.add(name, wrappers)


def log_probabilities(engine: Engine, row: Row) -> np.ndarray:
    logits = np.array(engine.loaded.model(mx.array(row.tokens[None]))[0].astype(mx.float32), np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


# Adapters inside the layers, and one that changes what the head multiplies by (tied embeddings).
@pytest.mark.parametrize("targets", ["attention", ["embed_tokens", "q_proj"]])
def test_drift_is_the_forward_kl_at_positions_with_loss(
    tiny: LoadedModel, write_rows: Callable[..., Path], targets: Any
) -> None:
    rows = [{"prompt": f"say {number}", "completion": "x" * (number + 1)} for number in range(5)]
    asked = questions(str(write_rows(rows)), Data(), tiny.tokenizer, exact=False)
    engine = Engine(tiny)
    changed(engine, "mine", targets=targets)
    read = []
    moved = Drift(engine, asked.rows, lambda: read.append(1)).of("mine")
    assert len(read) == 2 * len(asked.rows)
    kl, before, after, tokens = 0.0, 0.0, 0.0, 0
    for row in asked.rows:
        sides = []
        for name in (None, "mine"):
            engine.use(name)
            sides.append(log_probabilities(engine, row))
        for place in np.flatnonzero(row.weights) - 1:
            p, q = (side[place] for side in sides)
            kl += float((np.exp(p) * (p - q)).sum())
            target = row.tokens[place + 1]
            before, after, tokens = before - p[target], after - q[target], tokens + 1
    assert moved.kl == pytest.approx(kl / tokens, rel=1e-3) and moved.kl > 1e-3
    assert (moved.loss_base, moved.loss_tuned) == pytest.approx((before / tokens, after / tokens), rel=1e-4)
    assert moved.difference.estimate == pytest.approx((after - before) / tokens, rel=1e-2, abs=1e-4)
    low, high = moved.difference.interval
    assert low <= moved.difference.estimate <= high


def test_an_adapter_that_does_nothing_has_not_moved(tiny: LoadedModel, write_rows: Callable[..., Path]) -> None:
    asked = questions(str(write_rows([{"prompt": "a", "completion": "b"}] * 3)), Data(), tiny.tokenizer, exact=False)
    engine = Engine(tiny)
    engine.add("fresh", build(tiny.model, Adapter(rank=4)))
    moved = Drift(engine, asked.rows).of("fresh")
    assert moved.kl == pytest.approx(0, abs=1e-6) and moved.difference.p_value == 1.0
    assert attached(tiny.model), "the last one asked about stays attached"


def test_spaced_items_begin_and_end_with_the_ends() -> None:
    assert spaced(range(5), 9) == [0, 1, 2, 3, 4]
    assert spaced(range(10), 4) == [0, 3, 6, 9]
