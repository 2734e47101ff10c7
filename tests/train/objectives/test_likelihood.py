"""The loss against numpy, from the logits of mlx_lm's own model on the same rows, and its gradients tile by tile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter, Data
from mlx_lora.data.batch import collate
from mlx_lora.data.encode import Encoder
from mlx_lora.data.example import conversation
from mlx_lora.data.rows import Row
from mlx_lora.models.load import LoadedModel
from mlx_lora.models.trunk.trunk import Trunk
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.quant.matmul import use_fast_multiply
from mlx_lora.train.objectives import likelihood as losses
from mlx_lora.train.objectives.likelihood import Arrays, Loss, as_arrays, negative_log_likelihood
from tests.adapters.zoo import MODELS, VOCABULARY, network

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
    pairs = [row for example in examples for row in encoder.rows(example)]
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
    ours = Loss(take_apart(tiny.model))(as_arrays(collate(rows)))
    assert ours.item() == pytest.approx(reference(theirs, rows), rel=1e-5)


def test_of_a_model_that_cant_be_taken_apart_the_loss_is_the_same(tiny: LoadedModel) -> None:
    arrays = as_arrays(collate(rows_of(tiny.tokenizer, "assistant")))
    apart, whole = (
        Loss(trunk)(arrays).item() for trunk in (take_apart(tiny.model), Trunk(tiny.model, vocabulary=VOCABULARY))
    )
    assert apart == pytest.approx(whole, rel=1e-5)


def test_only_positions_with_loss_reach_the_output_head(tiny: LoadedModel) -> None:
    """One row of logits per trained token, plus the padding to a multiple that is planned."""
    parts = take_apart(tiny.model)
    seen = []
    original = parts.head
    parts.head = lambda hidden: seen.append(hidden.shape[0]) or original(hidden)  # type: ignore[method-assign,func-returns-value]
    batch = collate(rows_of(tiny.tokenizer, "last"))
    Loss(parts)(as_arrays(batch))
    assert batch.trained <= seen[0] < batch.trained + 16 < batch.inputs.size


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = mx.random.normal((5, 300), key=mx.random.key(0)).astype(mx.float16)
    nll = negative_log_likelihood(logits, mx.arange(5))
    assert nll.dtype == mx.float32
    exact = np.array(logits).astype(np.float64)
    exact = np.log(np.exp(exact).sum(axis=1)) - exact[np.arange(5), np.arange(5)]
    np.testing.assert_allclose(np.array(nll), exact, rtol=1e-5)


Gradients = dict[str, np.ndarray]
UNTIED = ["llama untied", "phi3 fused qkv", "qwen3 experts"]


def sum_over_everything(model: nn.Module) -> Callable[[Arrays], mx.array]:
    """The loss as anyone would write it: the logits of all positions at once."""

    def summed(arrays: Arrays) -> mx.array:
        logits = model(arrays["inputs"])
        picked = logits.reshape(-1, logits.shape[-1])[arrays["positions"]]
        return (negative_log_likelihood(picked, arrays["targets"]) * arrays["weights"]).sum()

    return summed


def weighed_rows(
    lengths: tuple[int, ...] = (14, 9), *, seed: int = 0, weights: tuple[float, ...] = (0, 0.25, 1, 3)
) -> Any:
    """A batch whose rows have random tokens and weights."""
    draw = np.random.default_rng(seed)
    rows = [
        Row(draw.integers(1, VOCABULARY, length).astype(np.int32), draw.choice(weights, length).astype(np.float32))
        for length in lengths
    ]
    for row in rows:
        row.weights[0], row.weights[-1] = 0, 0.5
    return collate(rows)


def with_adapter(model: nn.Module, targets: str | list[str], **settings: Any) -> nn.Module:
    """`model` with an adapter that changes its outputs, training."""
    for index, wrapper in enumerate(attach(model, Adapter(rank=2, targets=targets, **settings)).values()):
        wrapper.lora_b = 0.05 * mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(index))
    model.train()
    return model


def value_and_gradients(
    model: nn.Module, loss: Callable[[Arrays], mx.array], arrays: Arrays, *, compiled: bool = False
) -> tuple[float, Gradients]:
    function = nn.value_and_grad(model, loss)
    if compiled:
        mx.eval(model.state)
        function = mx.compile(function, inputs=[model.state], outputs=[model.state])
    value, tree = function(arrays)
    return value.item(), {name: np.array(array.astype(mx.float32)) for name, array in tree_flatten(tree)}


def parts_of(model: nn.Module) -> Trunk:
    """The trunk, verified without dropout."""
    training = model.training
    model.eval()
    parts = take_apart(model)
    model.train(training)
    assert parts.apart
    return parts


def cut_into(monkeypatch: pytest.MonkeyPatch, rows_a_tile: int, vocabulary: int = VOCABULARY) -> None:
    for name in ("TILE_BYTES", "TILE_BYTES_GPU"):
        monkeypatch.setattr(losses, name, 4 * vocabulary * rows_a_tile)
    monkeypatch.setattr(losses, "LEAST_ROWS", 1)


def assert_same(ours: tuple[float, Gradients], theirs: tuple[float, Gradients], tolerance: float = 1e-4) -> None:
    """Each gradient is compared on its own scale: small ones have to be right as well."""
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1].keys() == theirs[1].keys() and ours[1]
    for name, gradient in theirs[1].items():
        scale = np.abs(gradient).max()
        assert scale > 0, f"{name} has no gradient: nothing is compared"
        np.testing.assert_allclose(ours[1][name], gradient, rtol=0, atol=tolerance * scale, err_msg=name)


PLACES = [
    *((name, "all-linear") for name in MODELS),
    *((name, ["embed_tokens"]) for name in MODELS),
    *((name, ["lm_head"]) for name in UNTIED),
    ("llama", ["embed_tokens", "q_proj", "down_proj"]),
    ("llama untied", ["embed_tokens", "lm_head", "v_proj"]),
]


@pytest.mark.parametrize(("name", "targets"), PLACES, ids=str)
def test_value_and_gradients_are_those_of_the_whole_logits(
    name: str, targets: str | list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_adapter(network(name), targets)
    arrays = as_arrays(weighed_rows())
    expected = value_and_gradients(model, sum_over_everything(model), arrays)
    before = [(path, id(array)) for path, array in tree_flatten(model.parameters())]
    rows = arrays["positions"].size
    for rows_a_tile in (rows, -(-rows // 3)):
        cut_into(monkeypatch, rows_a_tile)
        loss = Loss(parts_of(model))
        assert_same(value_and_gradients(model, loss.differentiable, arrays), expected)
        assert loss(arrays).item() == pytest.approx(expected[0], rel=1e-5)
    assert [path for path, _ in before] == [path for path, _ in tree_flatten(model.parameters())]


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("rows_a_tile", [0, 1, 5, 8, 1000])
@pytest.mark.parametrize(
    ("name", "targets"),
    [("llama", ["embed_tokens", "q_proj"]), ("llama untied", ["lm_head", "q_proj"]), ("gemma2 soft caps", "attention")],
    ids=str,
)
def test_the_cut_into_tiles_changes_nothing(
    name: str, targets: str | list[str], rows_a_tile: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_adapter(network(name), targets)
    arrays = as_arrays(weighed_rows())
    expected = value_and_gradients(model, sum_over_everything(model), arrays)
    cut_into(monkeypatch, rows_a_tile)
    ours = value_and_gradients(model, Loss(parts_of(model)).differentiable, arrays, compiled=compiled)
    assert_same(ours, expected)


@pytest.mark.parametrize("fast", [False, True], ids=["mlx's multiply", "dequantizing multiply"])
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", "all-linear"), ("llama", ["embed_tokens", "q_proj"]), ("llama untied", ["lm_head", "q_proj"]),
        ("gemma2 soft caps", ["embed_tokens"]), ("cohere logit scale", "attention"), ("mixtral experts", "all-linear"),
    ],
    ids=str,
)  # fmt: skip
def test_quantized_heads_give_the_same_gradients(
    name: str, targets: str | list[str], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(name)
    nn.quantize(model, group_size=32, bits=4)
    model.freeze()
    if fast:
        use_fast_multiply(model)
    with_adapter(model, targets)
    arrays = as_arrays(weighed_rows())
    expected = value_and_gradients(model, sum_over_everything(model), arrays)
    for rows_a_tile in (6, 1000):
        cut_into(monkeypatch, rows_a_tile)
        assert_same(value_and_gradients(model, Loss(parts_of(model)).differentiable, arrays), expected)


@pytest.mark.parametrize("rows_a_tile", [1, 6, 1000])
def test_gradients_of_the_head_equal_finite_differences_in_float64(
    rows_a_tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_adapter(network("llama untied"), ["lm_head"])
    batch, parts = weighed_rows(), parts_of(model)
    cut_into(monkeypatch, rows_a_tile)
    value, gradients = value_and_gradients(model, Loss(parts).differentiable, as_arrays(batch))
    head = model.lm_head
    hidden = np.array(parts.run(mx.array(batch.inputs)), np.float64).reshape(batch.inputs.size, -1)
    weight = np.array(head.linear.weight, np.float64)
    factors = {name: np.array(head[name], np.float64) for name in ("lora_a", "lora_b")}

    def exact(**changed: np.ndarray) -> float:
        a, b = (factors | changed).values()
        logits = hidden @ weight.T + head.scale * hidden @ a @ b
        top = logits.max(axis=1)
        nll = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        nll -= logits[np.arange(len(logits)), batch.targets.reshape(-1)]
        return float((nll * batch.weights.reshape(-1)).sum())

    assert value == pytest.approx(exact(), rel=1e-6)
    for name, factor in factors.items():
        gradient = gradients[f"lm_head.{name}"]
        for seed in range(5):
            direction = np.random.default_rng(seed).normal(size=factor.shape)
            ends = [exact(**{name: factor + step * direction}) for step in (1e-5, -1e-5)]
            assert (gradient * direction).sum() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "llama untied"])
def test_dropout_on_the_head_is_the_same_in_both_passes_of_a_tile(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another mask behind the logits than in them, the gradient would be that of no loss at all."""
    head = "embed_tokens" if name == "llama" else "lm_head"
    model = with_adapter(network(name), [head], dropout=0.5)
    cut_into(monkeypatch, 6)
    loss, arrays = Loss(parts_of(model)), as_arrays(weighed_rows((40, 33)))
    mx.random.seed(3)
    value, gradients = value_and_gradients(model, loss.differentiable, arrays)
    wrapper = model.model.embed_tokens if name == "llama" else model.lm_head
    (key,) = [key for key in gradients if key.endswith("lora_a")]
    original, direction = wrapper.lora_a, mx.random.normal(wrapper.lora_a.shape, key=mx.random.key(8))
    values = []
    for step in (1e-3, -1e-3, 0):
        wrapper.lora_a = original + step * direction
        mx.random.seed(3)
        values.append(loss.differentiable(arrays).item())
    assert values[2] == pytest.approx(value, rel=1e-6), "the same seed draws other masks"
    mx.random.seed(4)
    assert loss.differentiable(arrays).item() != pytest.approx(value, rel=1e-6), "nothing is dropped"
    expected = (gradients[key] * np.array(direction)).sum()
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(expected, rel=0.02, abs=0.05)


@pytest.mark.parametrize("targets", ["attention", ["embed_tokens"]], ids=["inside", "on the head"])
@pytest.mark.parametrize("rows_a_tile", [1, 5, 1000])
def test_only_a_tile_of_logits_is_made_at_once_and_each_row_in_one(
    rows_a_tile: int, targets: str | list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_adapter(network("llama"), targets)
    batch, parts = weighed_rows((14, 9, 30)), parts_of(model)
    cut_into(monkeypatch, rows_a_tile)
    entered: list[int] = []
    head = parts.head
    parts.head = lambda hidden: entered.append(len(hidden)) or head(hidden)  # type: ignore[method-assign,func-returns-value]
    arrays = as_arrays(batch)
    wanted = arrays["positions"].size
    assert batch.trained <= wanted < batch.trained + 8 < batch.inputs.size
    Loss(parts)(arrays)
    assert sum(entered) == wanted and max(entered) <= rows_a_tile
    assert max(entered) - min(entered) <= 1, "tiles of many sizes are as many kernels"
    once, entered[:] = sorted(entered), []
    value_and_gradients(model, Loss(parts).differentiable, arrays)
    assert sorted(entered) == sorted(once * 2), "each tile is traced for its logits and for their gradient, and no more"


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("targets", ["attention", ["lm_head"], ["embed_tokens"]], ids=str)
def test_of_a_model_that_cant_be_taken_apart_value_and_gradients_are_the_same(
    targets: str | list[str], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_adapter(network("llama untied"), targets)
    arrays = as_arrays(weighed_rows())
    expected = value_and_gradients(model, sum_over_everything(model), arrays)
    cut_into(monkeypatch, 4)
    assert_same(
        value_and_gradients(model, Loss(Trunk(model, vocabulary=VOCABULARY)).differentiable, arrays, compiled=compiled),
        expected,
    )


def test_gradients_follow_what_is_done_with_the_sum() -> None:
    model = with_adapter(network("llama"), ["embed_tokens", "q_proj"])
    loss, arrays = Loss(parts_of(model)), as_arrays(weighed_rows())
    value, gradients = value_and_gradients(model, loss.differentiable, arrays)
    squared = value_and_gradients(model, lambda arrays: loss.differentiable(arrays).square(), arrays)
    assert_same(squared, (value**2, {name: 2 * value * gradient for name, gradient in gradients.items()}))


def test_positions_without_loss_change_nothing() -> None:
    """Padding of the picked positions is position 0 with weight 0."""
    model = with_adapter(network("llama"), ["embed_tokens", "q_proj"])
    arrays = as_arrays(weighed_rows())
    more = {"positions": mx.zeros(40, mx.int32), "targets": mx.arange(40), "weights": mx.zeros(40)}
    longer = arrays | {name: mx.concatenate([arrays[name], array]) for name, array in more.items()}
    loss = Loss(parts_of(model)).differentiable
    assert_same(value_and_gradients(model, loss, longer), value_and_gradients(model, loss, arrays))


@pytest.mark.parametrize("name", ["llama untied", "gemma2 soft caps"])
def test_extreme_logits_stay_finite_and_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """±1e4: what isn't the largest has a probability of exactly zero, and a loss of thousands."""
    model = network(name)
    path = "lm_head" if name == "llama untied" else "model.embed_tokens"
    weight = dict(tree_flatten(model.parameters()))[f"{path}.weight"]
    if name == "llama untied":
        arrays = as_arrays(weighed_rows())
        hidden = parts_of(model).run(arrays["inputs"])
        model.load_weights([(f"{path}.weight", weight * (1e4 / mx.abs(hidden @ weight.T).max()))], strict=False)
    else:
        model.load_weights([(f"{path}.weight", weight * 1e3)], strict=False)
        model.final_logit_softcapping = 1e4
    with_adapter(model, ["q_proj"])
    arrays = as_arrays(weighed_rows())
    cut_into(monkeypatch, 6)
    ours = value_and_gradients(model, Loss(parts_of(model)).differentiable, arrays)
    assert ours[0] > 1e4
    assert np.isfinite(ours[0]) and all(np.isfinite(gradient).all() for gradient in ours[1].values())
    theirs = value_and_gradients(model, sum_over_everything(model), arrays)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    for key, gradient in theirs[1].items():
        np.testing.assert_allclose(ours[1][key], gradient, rtol=0, atol=2e-3 * np.abs(gradient).max(), err_msg=key)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_precision_gives_nearly_the_same_and_a_float32_sum(
    dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_adapter(network("llama", dtype=dtype), ["embed_tokens", "q_proj"])
    arrays = as_arrays(weighed_rows())
    cut_into(monkeypatch, 6)
    loss = Loss(parts_of(model))
    assert loss.differentiable(arrays).dtype == loss(arrays).dtype == mx.float32
    ours = value_and_gradients(model, loss.differentiable, arrays)
    theirs = value_and_gradients(model, sum_over_everything(model), arrays)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-2)
    for name, gradient in theirs[1].items():
        np.testing.assert_allclose(ours[1][name], gradient, rtol=0, atol=5e-2 * np.abs(gradient).max(), err_msg=name)


def peak_of(function: Callable[[Arrays], Any], arrays: Arrays) -> int:
    """Bytes above what is there, with MLX waiting for each operation, so that nothing is made ahead of its turn."""
    limit = mx.set_memory_limit(0)
    try:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(function(arrays))
        return mx.get_peak_memory() - before
    finally:
        mx.set_memory_limit(limit)


def test_a_large_vocabulary_costs_a_tile_and_not_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, rows = 60_000, 64
    monkeypatch.setitem(
        MODELS, "wide", ("llama", {"vocab_size": vocabulary, "hidden_size": 16, "num_hidden_layers": 1})
    )
    model = with_adapter(network("wide"), ["q_proj"])
    arrays = {
        "inputs": mx.arange(rows)[None] + 1, "positions": mx.arange(rows), "targets": mx.arange(rows) * 7,
        "weights": mx.ones(rows),
    }  # fmt: skip
    cut_into(monkeypatch, 8, vocabulary)
    peaks = []
    for loss in (sum_over_everything(model), Loss(parts_of(model)).differentiable):
        function = nn.value_and_grad(model, loss)
        mx.eval(model.state, arrays)
        peaks.append(peak_of(mx.compile(function), arrays))
    logits, tile = 4 * rows * vocabulary, 4 * 8 * vocabulary
    assert peaks[0] > 1.5 * logits, "this test measures nothing"
    assert peaks[1] < 7 * tile, [peak / tile for peak in peaks]
