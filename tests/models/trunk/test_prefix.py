"""A trunk cut below its first adapted layer: the same hidden states and gradients, and nothing computed below."""

from __future__ import annotations

import io
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter
from mlx_lora.models.trunk.prefix import Below, below, lowest_trainable
from mlx_lora.models.trunk.split import Split, layers_of, split
from tests.adapters import zoo

TOKENS = mx.array([[5, 9, 70, 2, 33, 11, 8], [60, 1, 4, 95, 7, 7, 20]])
# Its layers return keys and values too, some take those of a layer below, some a part of the embeddings.
GEMMA4 = {
    "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": zoo.VOCABULARY,
    "global_head_dim": 16, "layer_types": ["full_attention"] * 2,
}  # fmt: skip


def cut(model: nn.Module, first: int) -> tuple[Split, Below]:
    parts = split(model)
    assert parts is not None
    halves = below(parts, first)
    assert isinstance(halves, Below), halves
    return parts, halves


def adapted(model: nn.Module, layers: int) -> nn.Module:
    """The model with adapters in its last layers that do something."""
    for wrapper in attach(model, Adapter(rank=2, layers=layers)).values():
        wrapper.lora_b = 0.1 * mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(1))
    return model


def spoil(model: nn.Module, first: int) -> None:
    """Make everything below a layer NaN."""
    for module in [model.model.embed_tokens, *layers_of(model)[:first]]:
        module.load_weights([(name, array * mx.nan) for name, array in tree_flatten(module.parameters())])


@pytest.fixture(params=[(2, 1), (4, 1), (4, 3)], ids=lambda sizes: f"layer {sizes[1]} of {sizes[0]}")
def first(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Where to cut; the zoo's models get as many layers as the case has."""
    monkeypatch.setitem(zoo.COMMON, "num_hidden_layers", request.param[0])
    return int(request.param[1])


@pytest.mark.parametrize("name", list(zoo.MODELS))
def test_halves_give_the_trunks_output_and_leave_the_model_alone(name: str, first: int) -> None:
    model = zoo.network(name)
    before = [(path, id(module)) for path, module in model.named_modules()]
    parts, halves = cut(model, first)
    states = halves.states(TOKENS)
    assert (states.shape[-1], states.dtype) == (halves.width, halves.dtype)
    np.testing.assert_allclose(halves.trunk(states), parts.trunk(TOKENS), rtol=1e-5, atol=1e-5)
    assert not np.allclose(states, parts.trunk(TOKENS))
    assert [(path, id(module)) for path, module in model.named_modules()] == before


@pytest.mark.parametrize("name", list(zoo.MODELS))
def test_adapters_put_on_later_have_the_same_output_and_gradients(name: str, first: int) -> None:
    model = zoo.network(name)
    parts, halves = cut(model, first)
    states = halves.states(TOKENS)
    bare = halves.trunk(states)
    adapted(model, len(layers_of(model)) - first)
    assert lowest_trainable(model) == first
    assert not np.allclose(halves.trunk(states), bare)
    np.testing.assert_array_equal(halves.states(TOKENS), states)

    through_all = nn.value_and_grad(model, lambda tokens: mx.sin(parts.trunk(tokens)).sum())(TOKENS)
    through_rest = nn.value_and_grad(model, lambda hidden: mx.sin(halves.trunk(hidden)).sum())(states)
    np.testing.assert_allclose(through_rest[0], through_all[0], rtol=1e-5)
    gradients = dict(tree_flatten(through_rest[1]))
    for path, expected in tree_flatten(through_all[1]):
        np.testing.assert_allclose(gradients.pop(path), expected, rtol=1e-4, atol=1e-5, err_msg=path)
    assert not gradients


def test_halves_compile_and_keep_nothing_between_calls(first: int) -> None:
    model = adapted(zoo.network("llama"), 1)
    parts, halves = cut(model, first)
    states = mx.compile(halves.states, inputs=[model.state])
    trunk = mx.compile(halves.trunk, inputs=[model.state])
    for tokens in (TOKENS, TOKENS[:1, :4], TOKENS[::-1]):
        np.testing.assert_allclose(trunk(states(tokens)), parts.trunk(tokens), rtol=1e-5, atol=1e-5)
    wrapper = layers_of(model)[-1].self_attn.q_proj
    wrapper.lora_b = 2 * wrapper.lora_b
    np.testing.assert_allclose(trunk(states(TOKENS)), parts.trunk(TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", list(zoo.MODELS))
def test_nothing_below_the_cut_is_used_by_the_rest(name: str, compiled: bool, first: int) -> None:
    model = zoo.network(name)
    _, halves = cut(model, first)
    states = halves.states(TOKENS)
    expected = np.array(halves.trunk(states))
    spoil(model, first)
    trunk = mx.compile(halves.trunk, inputs=[model.state]) if compiled else halves.trunk
    assert np.isnan(halves.states(TOKENS)).any()
    np.testing.assert_allclose(trunk(states), expected, rtol=1e-5, atol=1e-5)


def test_the_rest_is_a_graph_of_its_own_layers_only(first: int) -> None:
    """No embedding lookup, and as many multiplications as the layers from the cut on have."""
    model = zoo.network("llama")
    parts, halves = cut(model, first)
    states = halves.states(TOKENS)
    mx.eval(states)
    whole, rest = (graph(output) for output in (parts.trunk(TOKENS), halves.trunk(states)))
    layers = len(layers_of(model))
    assert (whole.count("Gather"), rest.count("Gather")) == (1, 0)
    assert rest.count("Matmul") * layers == whole.count("Matmul") * (layers - first) > 0


def graph(output: mx.array) -> str:
    text = io.StringIO()
    mx.export_to_dot(text, output)
    return text.getvalue()


def test_states_run_no_layer_from_the_cut_on(first: int) -> None:
    model = zoo.network("llama")
    _, halves = cut(model, first)
    states = np.array(halves.states(TOKENS))
    for layer in layers_of(model)[first:]:
        layer.self_attn = None
    np.testing.assert_array_equal(halves.states(TOKENS), states)


def test_states_are_constants_and_halves_take_a_cache() -> None:
    model = zoo.network("qwen3")
    parts, halves = cut(model, 1)
    model.unfreeze()
    _, gradients = nn.value_and_grad(model, lambda: halves.states(TOKENS).sum())()
    assert all(not mx.any(gradient).item() for _, gradient in tree_flatten(gradients))
    packed: list[Any] = [Packed() for _ in layers_of(model)]
    expected = parts.trunk(TOKENS, packed)
    np.testing.assert_allclose(halves.trunk(halves.states(TOKENS, packed), packed), expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(expected, parts.trunk(TOKENS))


class Packed:
    """Stands in for the cache of packed rows: positions restart, so that tokens from 3 on see none before 3."""

    offset = 0

    def make_mask(self, length: int, **_: Any) -> mx.array:
        row = mx.arange(length) >= 3
        return (row[:, None] == row[None]) & (mx.arange(length)[:, None] >= mx.arange(length)[None])

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_precision_and_packed_weights_give_the_same_bits(dtype: mx.Dtype) -> None:
    model = zoo.network("llama", dtype=dtype)
    nn.quantize(model, group_size=32, bits=4)
    parts, halves = cut(model, 1)
    assert halves.dtype == dtype
    assert mx.array_equal(halves.trunk(halves.states(TOKENS)), parts.trunk(TOKENS))


def test_a_language_model_inside_another_is_cut_too() -> None:
    outer = Outer()
    parts, halves = cut(outer, 1)
    assert parts.language
    np.testing.assert_allclose(halves.trunk(halves.states(TOKENS)), parts.trunk(TOKENS), rtol=1e-5, atol=1e-5)


class Outer(nn.Module):
    """A model around a language model, as those that also see images."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model = zoo.network("llama")

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        return self.language_model(tokens, cache)

    @property
    def layers(self) -> list[nn.Module]:
        return self.language_model.layers


@pytest.mark.parametrize("changes", [{}, {"num_kv_shared_layers": 1}, {"hidden_size_per_layer_input": 8}])
def test_layers_that_hand_on_more_than_hidden_states_are_refused(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(zoo.MODELS, "gemma4", ("gemma4_text", {**GEMMA4, **changes}))
    parts = split(zoo.network("gemma4"))
    assert parts is not None
    assert "take more than hidden states (ValueError)" in str(below(parts, 1))


class Trunk(nn.Module):
    """Layers that are also given the embeddings, run twice, or aren't in one list."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.embed_tokens = nn.Embedding(32, 8)
        self.layers = [nn.Linear(8, 8) for _ in range(2)]
        if kind == "unlisted":
            self.upper = self.layers.pop()

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        h = embeddings = self.embed_tokens(tokens)
        for layer in self.layers * (2 if self.kind == "twice" else 1):
            h = layer(h)
        return h + embeddings if self.kind == "embeddings" else h


class Whole(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.model = Trunk(kind)

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        return self.model.embed_tokens.as_linear(self.model(tokens))

    @property
    def layers(self) -> list[nn.Module]:
        return [*self.model.layers, self.model.upper] if self.model.kind == "unlisted" else self.model.layers


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("plain", None),
        ("embeddings", "the output differs"),
        ("twice", "the output differs"),
        ("unlisted", "doesn't keep its layers in one list"),
    ],
)
def test_trunks_that_do_more_than_run_their_layers_once_are_refused(kind: str, reason: str | None) -> None:
    mx.random.seed(0)
    halves = below(Split(Whole(kind), "model"), 1)
    assert isinstance(halves, Below) if reason is None else reason in str(halves)


@pytest.mark.parametrize("first", [-1, 0, 2])
def test_a_cut_needs_layers_on_both_sides(first: int) -> None:
    parts = split(zoo.network("llama"))
    assert parts is not None
    assert below(parts, first) == f"the model's 2 layers can't be cut at layer {first}"


def test_the_lowest_trainable_layer_or_why_there_is_none() -> None:
    model = zoo.network("llama untied")
    assert lowest_trainable(model) == "nothing is trained"
    attach(model, Adapter(rank=2, layers=[1]))
    assert lowest_trainable(model) == 1
    attach(model, Adapter(rank=2))
    assert lowest_trainable(model) == 0
    attach(model, Adapter(rank=2, targets=["embed_tokens", "q_proj"], layers=[1]))
    assert lowest_trainable(model) == "model.embed_tokens is trained, which is outside the layers"
