"""Prefix tuning in every layer: what attention computes, and that no cache, mask or batch knows of the prefix."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache

from mlx_lora.adapters.attach import attach, build, detach
from mlx_lora.adapters.prefix import Prefix
from mlx_lora.config import Adapter
from mlx_lora.data.batch import collate
from mlx_lora.errors import AdapterError, CannotFuse
from mlx_lora.models import shapes
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.lean import lean
from mlx_lora.models.trunk.packing import packing_refused
from mlx_lora.models.trunk.recompute import recomputed
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.train.objectives.likelihood import Loss, as_arrays
from tests.adapters import zoo
from tests.train.test_trainer import make_rows

COUNT = 5
TOKENS = (mx.arange(24) * 7 % 31 + 1).reshape(2, 12)
# Attention over latents, and layers that share the keys and values of others.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "latent": (
        "deepseek_v3",
        {
            "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
            "n_routed_experts": None, "first_k_dense_replace": 9, "num_key_value_heads": 4, "rope_scaling": None,
        },
    ),
    "shared": (
        "gemma4_text",
        {
            "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 4, "global_head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": zoo.VOCABULARY,
        },
    ),
}  # fmt: skip
NAMES = ["llama", "qwen3", "gemma2 soft caps", "gemma3", "phi3 fused qkv", "mixtral experts", *OTHERS]


def network(name: str, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(zoo, "MODELS", zoo.MODELS | OTHERS)
    return zoo.network(name)


def prefixed(model: nn.Module, method: str = "prefix", **settings: Any) -> nn.Module:
    """A model with prefixes that do something."""
    wrappers = attach(model, Adapter(method=method, virtual_tokens=COUNT, **settings))
    for key, wrapper in zip(mx.random.split(mx.random.key(3), len(wrappers)), wrappers.values(), strict=True):
        for name in wrapper.adapter_params():
            wrapper[name] = mx.random.normal(wrapper[name].shape, key=key)
    return model


def test_attention_sees_the_prefix_in_front_of_its_own_keys_and_values() -> None:
    model = prefixed(zoo.network("llama"))
    wrapper = layers_of(model)[0].self_attn
    base = wrapper.base
    x = mx.random.normal((2, 7, 64), key=mx.random.key(1))
    by_head = [
        projection(x).reshape(2, 7, -1, 16).transpose(0, 2, 1, 3)
        for projection in (base.q_proj, base.k_proj, base.v_proj)
    ]
    queries, keys = base.rope(by_head[0]), base.rope(by_head[1])
    before = [mx.broadcast_to(array, (2, *array.shape)) for array in (wrapper.prefix_keys, wrapper.prefix_values)]
    keys, values = mx.concatenate([before[0], keys], axis=2), mx.concatenate([before[1], by_head[2]], axis=2)
    keys, values = mx.repeat(keys, 2, axis=1), mx.repeat(values, 2, axis=1)
    allowed = mx.arange(7)[:, None] + COUNT >= mx.arange(7 + COUNT)
    scores = mx.where(allowed, queries @ keys.swapaxes(-1, -2) / 4, -mx.inf)
    expected = base.o_proj((mx.softmax(scores, axis=-1) @ values).transpose(0, 2, 1, 3).reshape(2, 7, -1))
    real = nn.MultiHeadAttention.create_additive_causal_mask(7)
    for mask in ("causal", allowed[:, COUNT:], real, real[None, None]):
        assert mx.allclose(wrapper(x, mask, None), expected, rtol=1e-4, atol=1e-4)
        assert mx.allclose(wrapper(x, cache=None, mask=mask), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_filled_in_parts_gives_what_one_pass_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(name, monkeypatch)
    bare = model(TOKENS)
    prefixed(model)
    whole, cache = model(TOKENS), make_prompt_cache(model)
    assert mx.abs(whole - bare).max() > 0.1
    parts = [
        model(TOKENS[:, part], cache=cache)
        for part in (slice(5), slice(5, 8), *(slice(i, i + 1) for i in range(8, 12)))
    ]
    assert mx.allclose(mx.concatenate(parts, axis=1), whole, rtol=1e-3, atol=1e-3)
    assert cache[0].offset == 12
    detach(model)
    assert mx.array_equal(model(TOKENS), bare)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_batch_of_unequal_prompts_is_answered_as_one_by_one(name: str) -> None:
    model = prefixed(zoo.network(name))
    prompts = [TOKENS[0].tolist()[:length] for length in (3, 12, 7)]
    generator = BatchGenerator(model, max_tokens=9)
    uids = generator.insert(prompts)
    answers: dict[int, list[int]] = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            answers[response.uid].append(int(response.token))
    generator.close()
    for uid, prompt in zip(uids, prompts, strict=True):
        tokens = list(prompt)
        for _ in range(9):
            tokens.append(int(model(mx.array([tokens]))[0, -1].argmax().item()))
        assert answers[uid] == tokens[len(prompt) :]


@pytest.mark.parametrize("method", ["prefix", "lora+prefix"])
def test_only_the_adapter_has_gradients_and_training_computes_them_alike(method: str) -> None:
    """Lean and recomputed passes are those of training; plain ones say what is right."""
    model = prefixed(zoo.network("qwen3"), method)
    rows, loss = make_rows(6), Loss(take_apart(model))
    compute = nn.value_and_grad(model, loss.differentiable)
    expected, gradients = compute(as_arrays(collate(rows)))
    names = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert {name.rpartition(".")[2] for name in names} == {"prefix_keys", "prefix_values", "lora_a", "lora_b"} - (
        {"lora_a", "lora_b"} if method == "prefix" else set()
    )
    by_name = dict(tree_flatten(gradients))
    assert by_name.keys() == names and all(mx.abs(array).max() > 0 for array in by_name.values())
    model.train()
    with lean(layers_of(model)), recomputed(layers_of(model)):
        value, again = compute(as_arrays(collate(rows)))
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, array in tree_flatten(again):
        assert mx.allclose(array, by_name[name], rtol=1e-3, atol=1e-4 * mx.abs(by_name[name]).max().item()), name


def test_packed_rows_are_refused_for_they_are_at_other_distances_from_it() -> None:
    model = zoo.network("qwen3")
    assert packing_refused(take_apart(model)) is None
    attach(model, Adapter(method="prefix"))
    assert "packing" in str(packing_refused(take_apart(model)))


def test_layers_and_places_are_chosen_and_shapes_need_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    large = {"hidden_size": 16384, "num_hidden_layers": 126, "intermediate_size": 53248, "num_attention_heads": 128}
    config = {**zoo.COMMON, "model_type": "llama", **large, "num_key_value_heads": 8, "head_dim": 128}
    wrappers = build(shapes.network(config, gpu=True), Adapter(method="prefix", virtual_tokens=64, layers=100))
    assert list(wrappers)[0] == "model.layers.26.self_attn" and len(wrappers) == 100
    assert all(
        wrapper.prefix_keys.shape == wrapper.prefix_values.shape == (8, 64, 128) for wrapper in wrappers.values()
    )
    latent = build(network("latent", monkeypatch), Adapter(method="prefix", virtual_tokens=3))
    assert [array.shape for array in latent["model.layers.1.self_attn"].adapter_arrays().values()] == [
        (1, 3, 32),
        (1, 3, 8),
    ]
    shared = build(network("shared", monkeypatch), Adapter(method="prefix"))
    assert list(shared) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]  # the others have no keys


def test_what_cannot_have_a_prefix_says_what_works() -> None:
    hidden = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(AdapterError, match="no chosen layer") as error:
        build(hidden, Adapter(method="prefix"))
    assert "lora" in str(error.value.hint)
    refused = Prefix.refusal(nn.Linear(4, 4), Adapter(method="prefix"), "x.q_proj")
    assert refused and "x.q_proj" in refused and "lora" in refused
    state = import_module("mlx_lm.models.mamba")
    config = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "state_size": 4, "num_hidden_layers": 2}
    more = {"conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 2, "model_type": "mamba"}
    with pytest.raises(AdapterError, match="no chosen layer"):
        build(state.Model(state.ModelArgs.from_dict(config | more)), Adapter(method="prefix"))
    model = prefixed(zoo.network("llama"))
    with pytest.raises(AdapterError, match="quantized cache"):
        model(TOKENS, cache=[QuantizedKVCache(group_size=32) for _ in layers_of(model)])
    wrapper = layers_of(model)[0].self_attn
    for merged in (wrapper.delta, wrapper.fuse):
        with pytest.raises(CannotFuse, match="prefix"):
            merged()


def test_the_start_gives_attention_to_zeros_and_nothing_else() -> None:
    """What comes out of attention is the base's, made smaller by the share of each head that the prefix takes."""
    bare = layers_of(zoo.network("llama"))[0].self_attn
    (wrapper,) = build(zoo.network("llama"), Adapter(method="prefix", virtual_tokens=1, layers=[0])).values()
    bare.o_proj = wrapper.base.o_proj = lambda heads: heads.reshape(2, 7, 4, 16)
    x = mx.random.normal((2, 7, 64), key=mx.random.key(1))
    before, after = bare(x, "causal"), wrapper(x, "causal")
    shares = (before * after).sum(axis=-1, keepdims=True) / (before * before).sum(axis=-1, keepdims=True)
    assert mx.allclose(after, shares * before, rtol=1e-4, atol=1e-5)
    assert 0 < shares.min() and shares.max() < 1 and shares.max() > 0.5
