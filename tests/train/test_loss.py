"""The loss against numpy, from the logits of mlx_lm's own model on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest

from mlx_lora.config import Data
from mlx_lora.data.batch import collate
from mlx_lora.data.encode import Encoder, Row
from mlx_lora.data.example import conversation
from mlx_lora.models.load import LoadedModel
from mlx_lora.models.split import split
from mlx_lora.train.loss import as_arrays, loss_function, negative_log_likelihood

TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "and a much longer question about the number two"},
    {"role": "assistant", "content": "two it is"},
]


def rows_of(tokenizer: Any, mask: str) -> list[Row]:
    """Three rows of different lengths, one far longer than the others, encoded with a mask."""
    encoder = Encoder(tokenizer, Data(mask=mask))
    examples = [conversation(TURNS), conversation(TURNS[1:3]), conversation([*TURNS[:3] * 4, *TURNS[3:]])]
    pairs = [encoder.tokens(example) for example in examples]
    return [Row(np.array(tokens, np.int32), np.array(weights, np.float32)) for tokens, weights in pairs]


def reference(model: Any, rows: list[Row]) -> float:
    """Σ weight · nll with numpy, one unpadded row at a time, in float64."""
    total = 0.0
    for row in rows:
        logits = np.array(model(mx.array(row.tokens[:-1])[None]))[0].astype(np.float64)
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        nll = -log_probabilities[np.arange(len(row) - 1), row.tokens[1:]]
        total += float((nll * row.weights[1:]).sum())
    return total


@pytest.mark.parametrize("mask", ["all", "completion", "assistant", "last"])
def test_loss_equals_numpy_over_mlx_lm_logits(tiny: LoadedModel, tiny_path: Path, mask: str) -> None:
    rows = rows_of(tiny.tokenizer, mask)
    theirs, _ = mlx_lm.utils.load_model(tiny_path)
    ours = loss_function(tiny.model, split(tiny.model))(*as_arrays(collate(rows)))
    assert ours.item() == pytest.approx(reference(theirs, rows), rel=1e-5)


def test_without_a_split_the_loss_is_the_same(tiny: LoadedModel) -> None:
    arrays = as_arrays(collate(rows_of(tiny.tokenizer, "assistant")))
    with_split, without = (loss_function(tiny.model, parts)(*arrays).item() for parts in (split(tiny.model), None))
    assert with_split == pytest.approx(without, rel=1e-5)


def test_only_positions_with_loss_reach_the_output_head(tiny: LoadedModel) -> None:
    """One row of logits per trained token, plus the padding to a multiple that is planned."""
    parts = split(tiny.model)
    assert parts is not None
    seen = []
    original = parts.head
    parts.head = lambda hidden: seen.append(hidden.shape[0]) or original(hidden)  # type: ignore[method-assign,func-returns-value]
    batch = collate(rows_of(tiny.tokenizer, "last"))
    loss_function(tiny.model, parts)(*as_arrays(batch))
    assert batch.trained <= seen[0] < batch.trained + 16 < batch.inputs.size


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = mx.random.normal((5, 300), key=mx.random.key(0)).astype(mx.float16)
    nll = negative_log_likelihood(logits, mx.arange(5))
    assert nll.dtype == mx.float32
    exact = np.array(logits).astype(np.float64)
    exact = np.log(np.exp(exact).sum(axis=1)) - exact[np.arange(5), np.arange(5)]
    np.testing.assert_allclose(np.array(nll), exact, rtol=1e-5)
