"""Lean layers: the same outputs and gradients as mlx-lm's own, less memory, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.llama
import mlx_lm.models.qwen3
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import activations, base

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter
from mlx_lora.machine import elementary
from mlx_lora.models.trunk import attention
from mlx_lora.models.trunk import lean as lean_module
from mlx_lora.models.trunk.activations import precise_swiglu, silu, swiglu
from mlx_lora.models.trunk.attention import scaled_dot_product_attention
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.lean import lean
from mlx_lora.models.trunk.recompute import recomputed
from mlx_lora.models.trunk.segments import caches
from tests.adapters.zoo import MODELS, VOCABULARY, network

WINDOW = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "sliding window": ("llama", WINDOW),
    "a head of keys a query": ("llama", {"num_key_value_heads": 4}),
    "one head of keys": ("llama", {"num_key_value_heads": 1}),
    "gpt_oss sinks": ("gpt_oss", {**WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
NAMES = [*MODELS, *FURTHER]
# Architectures whose layers compute attention and activation in a way of their own.
UNTOUCHED = {"gemma2 soft caps"}
TOKENS = mx.array(np.random.default_rng(0).integers(1, VOCABULARY, (2, 14)))
SEGMENTS = mx.array([[1] * 5 + [2] * 6 + [0] * 3, [1] * 2 + [2] * 3 + [3] * 9])
ONE_QUERY = 1  # fewer bytes than any score

Gradients = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def further_models(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, model in FURTHER.items():
        monkeypatch.setitem(MODELS, name, model)


def trained(name: str) -> nn.Module:
    """A model with an adapter everywhere that changes its outputs, training."""
    model = network(name)
    for index, wrapper in enumerate(attach(model, Adapter(rank=2, targets="all-linear")).values()):
        wrapper.lora_b = 0.05 * mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(index))
    model.train()
    return model


def outputs_and_gradients(
    model: nn.Module, *, packed: bool = False, compiled: bool = False
) -> tuple[np.ndarray, Gradients]:
    """Logits, and the gradients of a sum that no two of them enter alike."""

    def loss(tokens: mx.array) -> tuple[mx.array, mx.array]:
        logits = model(tokens, cache=caches(model, SEGMENTS) if packed else None)
        return (logits.square() * mx.cos(mx.arange(logits.size).reshape(logits.shape))).mean(), logits

    function = nn.value_and_grad(model, loss)
    if compiled:
        mx.eval(model.state)
        function = mx.compile(function, inputs=[model.state], outputs=[model.state])
    (_, logits), tree = function(TOKENS)
    return np.array(logits), {name: np.array(array) for name, array in tree_flatten(tree)}


def assert_same(ours: tuple[np.ndarray, Gradients], theirs: tuple[np.ndarray, Gradients]) -> None:
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4, atol=1e-5 * np.abs(theirs[0]).max())
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        atol = 1e-4 * np.abs(gradient).max() + 1e-9
        np.testing.assert_allclose(ours[1][name], gradient, rtol=1e-4, atol=atol, err_msg=name)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_the_same(name: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(name)
    expected = outputs_and_gradients(model, packed=packed)
    for scores_bytes in (attention.SCORES_BYTES, 4 * 2 * 4 * 5 * 14):  # all queries at once; five at a time
        monkeypatch.setattr(attention, "SCORES_BYTES", scores_bytes)
        with lean(layers_of(model)):
            changed = [type(module) for layer in layers_of(model) for module in layer.modules()]
            assert any(cls.__name__.startswith("Lean") for cls in changed) != (name in UNTOUCHED)
            assert_same(outputs_and_gradients(model, packed=packed), expected)
    assert_same(outputs_and_gradients(model, packed=packed), expected)


def test_a_module_that_layers_share_is_changed_once_and_comes_back() -> None:
    """Experts have one activation object for all layers, and for all models."""
    layers = layers_of(trained("qwen3 experts"))
    first, second = (layer.mlp.switch_mlp.activation for layer in layers)
    assert first is second, "nothing is shared: this test means nothing"
    original = type(first)
    with lean(layers):
        assert type(first) is not original
    assert type(first) is original


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3 experts", "sliding window"])
def test_compiled_and_recomputed_layers_are_lean_too(name: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(name)
    expected = outputs_and_gradients(model, packed=packed)
    monkeypatch.setattr(attention, "SCORES_BYTES", 4 * 2 * 4 * 5 * 14)
    layers = layers_of(model)
    classes = [type(module) for module in model.modules()]
    for outer, inner in ((lean, recomputed), (recomputed, lean), (lean, None)):
        with outer(layers), inner(layers) if inner else nullcontext():
            assert_same(outputs_and_gradients(model, packed=packed, compiled=True), expected)
            if inner:
                assert_same(outputs_and_gradients(model, packed=packed), expected)
        assert [type(module) for module in model.modules()] == classes


def test_both_functions_are_called_inside_and_neither_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    changed = []
    for part, name, theirs, ours in lean_module.FUNCTIONS:

        def watched(*arguments: Any, _name: str = name, _ours: Callable[..., Any] = ours, **named: Any) -> Any:
            called.append(_name)
            return _ours(*arguments, **named)

        changed.append((part, name, theirs, watched))
    monkeypatch.setattr(lean_module, "FUNCTIONS", changed)
    lean_module._lean_class.cache_clear()
    try:
        model = trained("llama")
        with lean(layers_of(model)):
            mx.eval(model(TOKENS))
            assert sorted(called) == ["scaled_dot_product_attention"] * 2 + ["swiglu"] * 2
        mx.eval(model(TOKENS))
        assert len(called) == 4
    finally:
        lean_module._lean_class.cache_clear()


def test_classes_come_back_and_neither_class_nor_module_is_patched() -> None:
    model, twin = trained("llama"), trained("llama")
    classes = [type(module) for module in model.modules()]
    llama = mlx_lm.models.llama
    functions = (llama.swiglu, llama.scaled_dot_product_attention, llama.Attention.__call__, llama.MLP.__call__)
    with pytest.raises(ZeroDivisionError):
        with lean(layers_of(model)):
            assert [type(module) for module in model.modules()] != classes
            assert [type(module) for module in twin.modules()] == classes, "another model has changed"
            assert isinstance(layers_of(model)[0].self_attn, llama.Attention)
            assert llama.swiglu is activations.swiglu and llama.swiglu is functions[0]
            assert llama.scaled_dot_product_attention is base.scaled_dot_product_attention is functions[1]
            assert (llama.Attention.__call__, llama.MLP.__call__) == functions[2:]
            raise ZeroDivisionError
    assert [type(module) for module in model.modules()] == classes


def test_parameters_and_their_names_stay_and_blocks_may_be_nested() -> None:
    model = trained("qwen3")
    expected = outputs_and_gradients(model)
    before = [(path, id(array)) for path, array in tree_flatten(model.parameters())]
    with lean(layers_of(model)):
        once = [type(module) for module in model.modules()]
        with lean(layers_of(model)):
            assert [(path, id(array)) for path, array in tree_flatten(model.parameters())] == before
            assert_same(outputs_and_gradients(model), expected)
        assert [type(module) for module in model.modules()] == once


# ---- attention by itself


def numpy_attention(q: Any, k: Any, v: Any, scale: float, mask: Any) -> np.ndarray:
    """In float64, a head of queries at a time; `mask` boolean or additive, or "causal"."""
    q, k, v = (np.array(array, np.float64) for array in (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    k, v = (np.repeat(array, repeats, axis=1) for array in (k, v))
    scores = scale * q @ k.swapaxes(-1, -2)
    if isinstance(mask, str):
        first = k.shape[2] - q.shape[2]
        mask = np.arange(first, k.shape[2])[:, None] >= np.arange(k.shape[2])
    if mask is not None:
        mask = np.array(mask)
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True) @ v


def mask_of(kind: str, shape: tuple[int, ...], *, additive: bool) -> mx.array:
    """Random, but every query may look at something; in each of `shape`'s leading axes another one."""
    length, keys = shape[-2:]
    allowed = np.random.default_rng(len(shape)).random(shape) < 0.6
    allowed |= np.eye(length, keys, keys - length, dtype=bool)
    if not additive:
        return mx.array(allowed)
    never = {"finite": np.finfo(np.float32).min, "infinite": -np.inf}[kind]
    return mx.array(np.where(allowed, np.random.default_rng(1).normal(size=shape), never).astype(np.float32))


LINES, HEADS, LENGTH, WIDTH = 3, 4, 11, 8
MASKS: dict[str, Callable[[int], Any]] = {
    "none": lambda keys: None,
    "causal": lambda keys: "causal",
    **{
        f"{kind} {len(leading)}D {leading}": lambda keys, kind=kind, leading=leading: mask_of(
            kind, (*leading, LENGTH, keys), additive=kind != "boolean"
        )
        for kind in ("boolean", "finite", "infinite")
        for leading in ((), (LINES, 1), (LINES, HEADS), (1, HEADS), (1, 1), (HEADS,))
    },
    "numbers, one line for all queries": lambda keys: mx.cos(mx.arange(keys))[None],
    "numbers, one line a row and head": lambda keys: mx.cos(mx.arange(LINES * HEADS * keys)).reshape(
        LINES, HEADS, 1, keys
    ),
    "numbers, one a head and query": lambda keys: mx.cos(mx.arange(HEADS * LENGTH)).reshape(HEADS, LENGTH, 1),
    "one line for all queries": lambda keys: mx.arange(keys)[None] % 3 > 0,
    "one line a row": lambda keys: (mx.arange(LINES * keys).reshape(LINES, 1, 1, keys) % 4) > 0,
}


@pytest.mark.parametrize("before", [0, 6], ids=["keys are the queries'", "more keys than queries"])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("mask", list(MASKS))
def test_attention_equals_mlx_lm_and_float64(
    mask: str, key_heads: int, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, scale = LENGTH + before, 0.7
    shapes = [(LINES, HEADS, LENGTH, WIDTH), (LINES, key_heads, keys, WIDTH), (LINES, key_heads, keys, WIDTH + 4)]
    arrays = [mx.random.normal(shape, key=mx.random.key(index)) for index, shape in enumerate(shapes)]
    cotangent = mx.random.normal((LINES, HEADS, LENGTH, WIDTH + 4), key=mx.random.key(9))
    made = MASKS[mask](keys)

    # a mask of numbers is an input like any other, whose gradient is compared too
    inputs = [*arrays, made] if isinstance(made, mx.array) and made.dtype != mx.bool_ else arrays

    def plain(q: mx.array, k: mx.array, v: mx.array, added: mx.array | None = None) -> mx.array:
        """What MLX differentiates itself."""
        repeats = HEADS // key_heads
        scores = scale * q @ mx.repeat(k, repeats, axis=1).swapaxes(-1, -2)
        here = mx.arange(before, keys)[:, None] >= mx.arange(keys) if isinstance(made, str) else made
        here = here if added is None else added
        if here is not None:
            scores = mx.where(here, scores, -mx.inf) if here.dtype == mx.bool_ else scores + here
        return mx.softmax(scores, axis=-1) @ mx.repeat(v, repeats, axis=1)

    (expected,), gradients = mx.vjp(plain, inputs, [cotangent])
    exact = numpy_attention(*arrays, scale, made)
    np.testing.assert_allclose(expected, exact, rtol=1e-4, atol=1e-5)
    for queries in (LENGTH, 4, 1):
        monkeypatch.setattr(attention, "SCORES_BYTES", 4 * LINES * HEADS * keys * queries)

        def ours(q: mx.array, k: mx.array, v: mx.array, added: mx.array | None = None) -> mx.array:
            return scaled_dot_product_attention(q, k, v, None, scale, made if added is None else added)

        (out,), by = mx.vjp(ours, inputs, [cotangent])
        np.testing.assert_allclose(out, exact, rtol=1e-4, atol=1e-5)
        assert len(by) == len(inputs)
        for name, one, other in zip(["q", "k", "v", "mask"], by, gradients, strict=False):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.gpu("the forward pass is one kernel, and only the backward pass has parts")
def test_fewer_bytes_are_more_parts_of_the_backward_pass_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    softmax = elementary.softmax
    monkeypatch.setattr(elementary, "softmax", lambda scores: seen.append(scores.shape) or softmax(scores))  # type: ignore[func-returns-value]
    q, k, v = (mx.random.normal((2, heads, 10, 8)) for heads in (4, 2, 2))
    for scores_bytes, queries in ((1 << 20, 10), (4 * 2 * 4 * 10 * 4, 4), (ONE_QUERY, 1)):
        monkeypatch.setattr(attention, "SCORES_BYTES_GPU", scores_bytes)
        seen.clear()
        out, _ = mx.vjp(lambda *qkv: scaled_dot_product_attention(*qkv, None, 1.0, "causal"), [q, k, v], [q])
        mx.eval(out)
        lengths = [shape[-2] for shape in seen]
        assert sum(lengths) == 10 and max(lengths) == queries
        assert [shape[-1] for shape in seen] == np.cumsum(lengths).tolist(), "keys behind a part are looked at"


@pytest.mark.processor("its forward pass has parts as well")
def test_fewer_bytes_are_more_parts_and_a_part_is_at_least_a_query(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    softmax = elementary.softmax
    monkeypatch.setattr(elementary, "softmax", lambda scores: seen.append(scores.shape) or softmax(scores))  # type: ignore[func-returns-value]
    q, k, v = (mx.random.normal((2, heads, 10, 8)) for heads in (4, 2, 2))
    for scores_bytes, queries in ((1 << 20, 10), (4 * 2 * 4 * 10 * 4, 4), (ONE_QUERY, 1)):
        monkeypatch.setattr(attention, "SCORES_BYTES", scores_bytes)
        seen.clear()
        mx.eval(scaled_dot_product_attention(q, k, v, None, 1.0, "causal"))
        lengths = [shape[-2] for shape in seen]
        assert sum(lengths) == 10 and max(lengths) == queries
        assert [shape[-1] for shape in seen] == np.cumsum(lengths).tolist(), "keys behind a part are looked at"


def test_sinks_and_quantized_caches_take_mlx_lms_own_way() -> None:
    q, k, v = (mx.random.normal((2, heads, 9, 32)) for heads in (4, 2, 2))
    sinks = mx.array([0.5, -1.0, 2.0, 0.0])
    ours = scaled_dot_product_attention(q, k, v, None, 0.2, "causal", sinks=sinks)
    np.testing.assert_array_equal(ours, base.scaled_dot_product_attention(q, k, v, None, 0.2, "causal", sinks))
    assert not np.allclose(ours, scaled_dot_product_attention(q, k, v, None, 0.2, "causal"))

    class Packed:
        bits, group_size = 8, 32

    k, v = (mx.quantize(array, group_size=32, bits=8) for array in (k, v))
    ours = scaled_dot_product_attention(q * 1, k, v, Packed(), 0.2, None)  # mlx-lm scales queries in place
    np.testing.assert_array_equal(ours, base.scaled_dot_product_attention(q * 1, k, v, Packed(), 0.2, None))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_precision_stays_half(dtype: mx.Dtype) -> None:
    q, k, v = (mx.random.normal((2, heads, 9, 8), key=mx.random.key(heads)).astype(dtype) for heads in (4, 2, 2))
    exact = numpy_attention(*(array.astype(mx.float32) for array in (q, k, v)), 0.3, "causal")

    def attend(*arrays: mx.array) -> mx.array:
        return scaled_dot_product_attention(*arrays, None, 0.3, "causal")

    (out,), gradients = mx.vjp(attend, [q, k, v], [mx.ones_like(q)])
    assert {array.dtype for array in (out, *gradients)} == {dtype}
    np.testing.assert_allclose(out.astype(mx.float32), exact, rtol=0, atol=3e-2)


def test_swiglu_and_its_gradients_equal_mlx_lms_also_for_extreme_gates() -> None:
    gate = mx.array([-1e4, -200, -88.5, -20, -1, -1e-3, 0, 1e-3, 1, 20, 88.5, 200, 1e4])
    x, cotangent = (mx.random.normal(gate.shape, key=mx.random.key(index)) for index in (1, 2))
    (out,), gradients = mx.vjp(swiglu, [gate, x], [cotangent])
    (theirs,), their_gradients = mx.vjp(lambda gate, x: gate * mx.sigmoid(gate) * x, [gate, x], [cotangent])
    np.testing.assert_allclose(out, theirs, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(out, activations.swiglu(gate, x), rtol=1e-5, atol=1e-12)
    for one, other in zip(gradients, their_gradients, strict=True):
        assert mx.all(mx.isfinite(one)).item()
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_other_activations_and_their_gradients_equal_mlx_lms(dtype: mx.Dtype) -> None:
    gate = mx.array([-1e4, -200, -20, -1, 0, 1, 20, 200, 1e4]).astype(dtype)
    h, x, cotangent = (mx.random.normal(gate.shape, key=mx.random.key(index)).astype(dtype) for index in (1, 2, 3))
    for ours, theirs, inputs in (
        (silu, nn.silu, [gate]),
        (lambda *a: precise_swiglu(h, *a), lambda *a: activations.precise_swiglu(h, *a), [gate, x]),
    ):
        (out,), gradients = mx.vjp(ours, inputs, [cotangent])
        (expected,), their_gradients = mx.vjp(theirs, inputs, [cotangent])
        for one, other in zip([out, *gradients], [expected, *their_gradients], strict=True):
            assert one.dtype == other.dtype == dtype and mx.all(mx.isfinite(one)).item()
            one, other = one.astype(mx.float32), other.astype(mx.float32)
            tolerance = 1e-5 if dtype == mx.float32 else 2e-2
            np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


# ---- memory


def peak_of(function: Callable[..., Any], *arguments: Any) -> int:
    """Bytes above what is there, with MLX waiting for each operation, so that nothing is made ahead of its turn."""
    limit = mx.set_memory_limit(0)
    try:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(function(*arguments))
        return mx.get_peak_memory() - before
    finally:
        mx.set_memory_limit(limit)


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_less_is_kept_for_the_backward_pass(compiled: bool) -> None:
    MODELS["wide"] = ("llama", {"num_hidden_layers": 6, "intermediate_size": 512})
    try:
        model = trained("wide")
    finally:
        del MODELS["wide"]
    tokens = mx.arange(512).reshape(4, 128) % VOCABULARY

    def loss(tokens: mx.array) -> mx.array:
        return model(tokens).square().mean()

    peaks = []
    for layers in ([], layers_of(model)):
        with lean(layers):
            function = nn.value_and_grad(model, loss)
            function = mx.compile(function, inputs=[model.state], outputs=[model.state]) if compiled else function
            mx.eval(model.state, tokens)
            peaks.append(peak_of(function, tokens))
    assert peaks[1] < 0.75 * peaks[0], peaks


@pytest.mark.processor("Metal's kernel holds no square, and what stands in for it on MLX's CPU backend does")
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "packed"])
def test_memory_of_attention_grows_with_the_length_and_not_its_square(
    masked: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SCORES_BYTES", 1 << 18)
    peaks = []
    for length in (256, 1024):
        q, k, v = (mx.random.normal((1, heads, length, 16), key=mx.random.key(heads)) for heads in (4, 2, 2))
        ids = mx.arange(length)[:, None] // 100
        mask = (ids == ids.T) & base.create_causal_mask(length) if masked else "causal"

        def loss(q: mx.array, k: mx.array, v: mx.array, mask: Any = mask) -> mx.array:
            return scaled_dot_product_attention(q, k, v, None, 0.25, mask).square().sum()

        function: Callable[..., Any] = mx.grad(loss, argnums=(0, 1, 2))
        mx.eval(q, k, v, mask)
        peaks.append(peak_of(mx.compile(function) if compiled else function, q, k, v))
    assert peaks[1] < 5 * peaks[0], peaks
    assert peaks[1] < 4 * 4 * 1024 * 1024 / 3, "a third of one square of scores"
