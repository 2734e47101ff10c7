"""KL, top-1 agreement, perplexity and delta survival against numpy and against known figures."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora.data.rows import Row
from mlx_lora.measure import Agreement, as_dict, compare, predictions, rows_of_tokens, survival
from mlx_lora.models.load import load
from tests.conftest import write_model

VOCABULARY = 11


def table(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32) * 2


class Table(nn.Module):
    """A model whose next token depends on the last one alone."""

    def __init__(self, values: np.ndarray, dtype: mx.Dtype):
        super().__init__()
        self.table = mx.array(values).astype(dtype)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.table[tokens]


def model(values: np.ndarray, dtype: mx.Dtype = mx.float32) -> Table:
    return Table(values, dtype)


def row(tokens: list[int], weights: list[float]) -> Row:
    return Row(np.array(tokens, np.int32), np.array(weights, np.float32))


# Of different lengths, with prompt tokens, and with a weight that is neither 0 nor 1.
ROWS = [
    row([3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]),
    row([2, 7, 1], [0, 1, 0.5]),
]


def reference(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    def log_softmax(logits: np.ndarray) -> np.ndarray:
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    kl, same, nll = [], [], []
    for tokens, weights in ((row.tokens, row.weights) for row in ROWS):
        for token, target, weight in zip(tokens[:-1], tokens[1:], weights[1:], strict=True):
            if weight:
                p, q = (log_softmax(logits[token].astype(np.float64)) for logits in (before, after))
                kl.append((np.exp(p) * (p - q)).sum())
                same.append(p.argmax() == q.argmax())
                nll.append((-p[target], -q[target]))
    perplexity = np.exp(np.mean(nll, axis=0))
    return {
        "kl": float(np.mean(kl)), "top1_agreement": float(np.mean(same)),
        "perplexity_before": float(perplexity[0]), "perplexity_after": float(perplexity[1]),
    }  # fmt: skip


def agreement_of(before: nn.Module, after: nn.Module, rows: list[Row] = ROWS) -> Agreement:
    return compare(predictions(before, rows), predictions(after, rows), rows)


def test_agreement_is_what_numpy_says_over_the_positions_with_loss() -> None:
    seen: list[int] = []
    first = predictions(model(table(0)), ROWS, on_row=lambda: seen.append(1))
    agreement = compare(first, predictions(model(table(1)), ROWS), ROWS)
    assert as_dict(agreement) == pytest.approx(reference(table(0), table(1)), rel=1e-5)
    assert agreement.tokens == 9 and len(seen) == len(ROWS)


def test_a_model_agrees_with_itself() -> None:
    agreement = agreement_of(model(table(0)), model(table(0)))
    assert (agreement.kl, agreement.top1_agreement) == (0.0, 1.0)
    assert agreement.perplexity_before == agreement.perplexity_after


def test_rows_without_loss_count_for_nothing() -> None:
    silent = row([8, 2, 8], [0, 0, 0])
    assert agreement_of(model(table(0)), model(table(1)), [silent, *ROWS]) == agreement_of(
        model(table(0)), model(table(1))
    )


def test_half_precision_logits_are_compared_in_float32() -> None:
    agreement = agreement_of(model(table(0)), model(table(0), mx.bfloat16))
    assert agreement.top1_agreement == 1 and 0 < agreement.kl < 1e-3


def test_rows_from_tokens_have_loss_on_all_but_the_first() -> None:
    (only,) = rows_of_tokens([[1, 2, 3], [4], []])
    assert only.tokens.tolist() == [1, 2, 3] and only.weights.tolist() == [0, 1, 1]


def array(*values: float) -> mx.array:
    return mx.array(list(values))


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([(array(3, 4), array(3, 4))], 1.0),
        ([(array(3, 4), array(0, 0))], 0.0),
        ([(array(3, 4), array(-3, -4))], -1.0),
        ([(array(3, 4), array(3, 0))], 0.2),
        ([(array(3), array(3)), (array(4), array(0))], 0.2),
        ([], 1.0),
        ([(array(0, 0), array(0, 0))], 1.0),
    ],
    ids=["all", "nothing", "the opposite", "a part", "over all together", "no update", "a zero update"],
)
def test_survival_is_one_less_the_relative_error(pairs: list[tuple[mx.array, mx.array]], expected: float) -> None:
    assert survival(pairs) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("bits", "ratio", "error"),
    [(4, 0.02, 5.5), (4, 0.1, 1.37), (4, 0.3, 0.81), (4, 1.0, 0.32), (8, 0.02, 0.78), (8, 0.1, 0.17), (8, 0.3, 0.055),
     (8, 1.0, 0.02)],
)  # fmt: skip
def test_survival_of_requantizing_gaussian_weights_is_as_measured(bits: int, ratio: float, error: float) -> None:
    """Δ rms against the step of the 4-bit base; at 4 bits small updates are erased, at 8 they stay."""
    base = mx.quantize(mx.random.normal((512, 512), key=mx.random.key(0)), group_size=64, bits=4)
    weight = mx.dequantize(*base, group_size=64, bits=4)
    step = mx.abs(base[1]).mean().item()
    update = ratio * step * mx.random.normal(weight.shape, key=mx.random.key(1))
    packed = mx.quantize(weight + update, group_size=64, bits=bits)
    realised = mx.dequantize(*packed, group_size=64, bits=bits) - weight
    assert 1 - survival([(update, realised)]) == pytest.approx(error, rel=0.25)


def test_freed_predictions_hold_the_head_alone_and_still_compare(tmp_path: Path) -> None:
    """A comparison of two large models has one of them in memory at a time."""
    path = write_model(tmp_path, hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
    rows = rows_of_tokens([[3, 1, 4, 1, 5, 9, 2, 6]])
    loaded = load(path)
    mx.eval(loaded.model.parameters())
    whole = sum(array.nbytes for _, array in tree_flatten(loaded.model.parameters()))
    held = predictions(loaded.model, rows)
    del loaded
    before = mx.get_active_memory()
    held.free()
    mx.clear_cache()
    assert before - mx.get_active_memory() > 0.8 * whole
    assert compare(held, predictions(load(path).model, rows), rows).top1_agreement == 1
