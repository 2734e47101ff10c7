"""A trunk cut below its first adapted layer: the same hidden states and gradients, and nothing computed below."""

from __future__ import annotations

import functools
import io
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter
from mlx_lora.models.trunk.layers import layers_of, lowest_trainable
from mlx_lora.models.trunk.trunk import Trunk
from mlx_lora.models.trunk.verify import take_apart, verify_start
from tests.adapters import zoo

TOKENS = mx.array([[5, 9, 70, 2, 33, 11, 8], [60, 1, 4, 95, 7, 7, 20]])
# Its layers return keys and values too, some take those of a layer below, some a part of the embeddings.
GEMMA4 = {
    "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": zoo.VOCABULARY,
    "global_head_dim": 16, "layer_types": ["full_attention"] * 2,
}  # fmt: skip


def cut(model: nn.Module, first: int) -> Trunk:
    trunk = take_apart(model)
    states = verify_start(trunk, first)
    assert isinstance(states, mx.array), states
    return trunk


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
    trunk = cut(model, first)
    states = trunk.entering(TOKENS, first)
    np.testing.assert_allclose(trunk.run(states, start=first), trunk.run(TOKENS), rtol=1e-5, atol=1e-5)
    assert not np.allclose(states, trunk.run(TOKENS))
    assert [(path, id(module)) for path, module in model.named_modules()] == before


@pytest.mark.parametrize("name", list(zoo.MODELS))
def test_adapters_put_on_later_have_the_same_output_and_gradients(name: str, first: int) -> None:
    model = zoo.network(name)
    trunk = cut(model, first)
    states = trunk.entering(TOKENS, first)
    bare = trunk.run(states, start=first)
    adapted(model, len(layers_of(model)) - first)
    assert lowest_trainable(model) == first
    assert not np.allclose(trunk.run(states, start=first), bare)
    np.testing.assert_array_equal(trunk.entering(TOKENS, first), states)

    through_all = nn.value_and_grad(model, lambda tokens: mx.sin(trunk.run(tokens)).sum())(TOKENS)
    through_rest = nn.value_and_grad(model, lambda hidden: mx.sin(trunk.run(hidden, start=first)).sum())(states)
    np.testing.assert_allclose(through_rest[0], through_all[0], rtol=1e-5)
    gradients = dict(tree_flatten(through_rest[1]))
    for path, expected in tree_flatten(through_all[1]):
        np.testing.assert_allclose(gradients.pop(path), expected, rtol=1e-4, atol=1e-5, err_msg=path)
    assert not gradients


def test_halves_compile_and_keep_nothing_between_calls(first: int) -> None:
    model = adapted(zoo.network("llama"), 1)
    trunk = cut(model, first)
    lower = mx.compile(lambda tokens: trunk.entering(tokens, first), inputs=[model.state])
    upper = mx.compile(lambda states: trunk.run(states, start=first), inputs=[model.state])
    for tokens in (TOKENS, TOKENS[:1, :4], TOKENS[::-1]):
        np.testing.assert_allclose(upper(lower(tokens)), trunk.run(tokens), rtol=1e-5, atol=1e-5)
    wrapper = layers_of(model)[-1].self_attn.q_proj
    wrapper.lora_b = 2 * wrapper.lora_b
    np.testing.assert_allclose(upper(lower(TOKENS)), trunk.run(TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", list(zoo.MODELS))
def test_nothing_below_the_cut_is_used_by_the_rest(name: str, compiled: bool, first: int) -> None:
    model = zoo.network(name)
    trunk = cut(model, first)
    states = trunk.entering(TOKENS, first)
    expected = np.array(trunk.run(states, start=first))
    spoil(model, first)
    rest = functools.partial(trunk.run, start=first)
    rest = mx.compile(rest, inputs=[model.state]) if compiled else rest
    assert np.isnan(trunk.entering(TOKENS, first)).any()
    np.testing.assert_allclose(rest(states), expected, rtol=1e-5, atol=1e-5)


def test_the_rest_is_a_graph_of_its_own_layers_only(first: int) -> None:
    """No embedding lookup, and as many multiplications as the layers from the cut on have."""
    model = zoo.network("llama")
    trunk = cut(model, first)
    states = trunk.entering(TOKENS, first)
    mx.eval(states)
    whole, rest = (graph(output) for output in (trunk.run(TOKENS), trunk.run(states, start=first)))
    layers = len(layers_of(model))
    assert (whole.count("Gather"), rest.count("Gather")) == (1, 0)
    assert rest.count("Matmul") * layers == whole.count("Matmul") * (layers - first) > 0


def graph(output: mx.array) -> str:
    text = io.StringIO()
    mx.export_to_dot(text, output)
    return text.getvalue()


def test_states_run_no_layer_from_the_cut_on(first: int) -> None:
    model = zoo.network("llama")
    trunk = cut(model, first)
    states = np.array(trunk.entering(TOKENS, first))
    for layer in layers_of(model)[first:]:
        layer.self_attn = None
    np.testing.assert_array_equal(trunk.entering(TOKENS, first), states)


def test_states_are_constants_and_take_segments() -> None:
    model = zoo.network("qwen3")
    trunk = cut(model, 1)
    model.unfreeze()
    _, gradients = nn.value_and_grad(model, lambda: trunk.entering(TOKENS, 1).sum())()
    assert all(not mx.any(gradient).item() for _, gradient in tree_flatten(gradients))
    ids = mx.array([[1] * 3 + [2] * 4] * 2)
    expected, states = trunk.run(TOKENS, segments=ids), trunk.entering(TOKENS, 1, segments=ids)
    np.testing.assert_allclose(trunk.run(states, start=1, segments=ids), expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(expected, trunk.run(TOKENS))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_precision_and_packed_weights_give_the_same_bits(dtype: mx.Dtype) -> None:
    model = zoo.network("llama", dtype=dtype)
    nn.quantize(model, group_size=32, bits=4)
    trunk = cut(model, 1)
    assert trunk.entering(TOKENS, 1).dtype == dtype
    assert mx.array_equal(trunk.run(trunk.entering(TOKENS, 1), start=1), trunk.run(TOKENS))


def test_a_language_model_inside_another_is_cut_too() -> None:
    outer = Outer()
    trunk = cut(outer, 1)
    assert trunk.language
    np.testing.assert_allclose(trunk.run(trunk.entering(TOKENS, 1), start=1), trunk.run(TOKENS), rtol=1e-5, atol=1e-5)


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
    trunk = take_apart(zoo.network("gemma4"))
    assert "take more than hidden states (ValueError)" in str(verify_start(trunk, 1))


class Layers(nn.Module):
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
        self.model = Layers(kind)

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
    found = verify_start(Trunk(Whole(kind), "model"), 1)
    assert isinstance(found, mx.array) if reason is None else reason in str(found)


@pytest.mark.parametrize("first", [-1, 0, 2])
def test_a_cut_needs_layers_on_both_sides(first: int) -> None:
    trunk = take_apart(zoo.network("llama"))
    assert verify_start(trunk, first) == f"the model's 2 layers can't be cut at layer {first}"


def test_the_lowest_trainable_layer_or_why_there_is_none() -> None:
    model = zoo.network("llama untied")
    assert lowest_trainable(model) == "nothing is trained"
    attach(model, Adapter(rank=2, layers=[1]))
    assert lowest_trainable(model) == 1
    attach(model, Adapter(rank=2))
    assert lowest_trainable(model) == 0
    attach(model, Adapter(rank=2, targets=["embed_tokens", "q_proj"], layers=[1]))
    assert lowest_trainable(model) == "model.embed_tokens is trained, which is outside the layers"
