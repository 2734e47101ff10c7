"""Attaching, swapping and taking off adapters on whole models; which modules a target names."""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import attach, attached, build, detach, put
from mlx_lora.adapters.targets import adaptable, find_targets
from mlx_lora.config import Adapter, Quantize
from mlx_lora.errors import AdapterError
from mlx_lora.models.load import LoadedModel, load
from mlx_lora.quant.quantize import quantize
from tests.adapters.zoo import network

TOKENS = mx.array([[5, 9, 70, 2, 33, 11, 8]])
QKVO = ["k_proj", "o_proj", "q_proj", "v_proj"]


def noisy(wrappers: dict[str, Any], seed: int = 1) -> None:
    """Make an adapter do something."""
    for index, wrapper in enumerate(wrappers.values()):
        key = mx.random.key(100 * seed + index)
        wrapper.lora_b = 0.3 * mx.random.normal(wrapper.lora_b.shape, key=key)


def last_names(paths: list[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})


@pytest.mark.parametrize(
    ("model", "targets", "names"),
    [
        ("llama", "attention", QKVO),
        ("llama untied", "all-linear", sorted([*QKVO, "gate_proj", "up_proj", "down_proj"])),
        ("phi3 fused qkv", "attention", ["o_proj", "qkv_proj"]),
        ("gemma3", "attention", QKVO),
        ("qwen3 experts", "attention", QKVO),
        ("qwen3 experts", "all-linear", sorted([*QKVO, "gate_proj", "up_proj", "down_proj"])),
        ("mixtral experts", "all-linear", sorted([*QKVO, "gate_proj", "up_proj", "down_proj"])),
        ("llama", ["q_proj", "embed_tokens"], ["embed_tokens", "q_proj"]),
        ("llama untied", "lm_head", ["lm_head"]),
        ("llama untied", ["lm_head", "self_attn.v_proj"], ["lm_head", "v_proj"]),
        ("qwen3 experts", ["gate"], ["gate"]),
        ("llama", r"/self_attn\.[qv]_proj$/", ["q_proj", "v_proj"]),
        ("llama", "/layers.1.mlp/", ["down_proj", "gate_proj", "up_proj"]),
    ],
)
def test_targets_name_the_modules_they_should(model: str, targets: Any, names: list[str]) -> None:
    """Routers and the output head are no part of all-linear, and routers never of attention."""
    found = find_targets(network(model), Adapter(targets=targets))
    assert last_names(found) == names
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    ("layers", "expected"), [("all", {0, 1, 2}), (1, {2}), (2, {1, 2}), (3, {0, 1, 2}), ([0], {0}), ([2, 0], {0, 2})]
)
def test_layers_choose_all_the_last_n_or_a_list(tiny: LoadedModel, layers: Any, expected: set[int]) -> None:
    found = find_targets(tiny.model, Adapter(targets=["q_proj"], layers=layers))
    assert {int(path.split(".")[2]) for path in found} == expected


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"targets": ["q_prj"]}, "no module is called 'q_prj'; did you mean 'q_proj'?", None),
        ({"targets": ["q_prj", "nothing", "v_proj"]}, "'q_prj'.*'nothing'", None),
        ({"targets": "/nowhere/"}, "no module for /nowhere/", "its layers have: .*q_proj"),
        ({"layers": 4}, "adapter.layers is 4, the model has 3 layers", None),
        ({"layers": [0, 3, -1]}, r"names \[3, -1\], the model's layers are 0 to 2", None),
        ({"layers": []}, "empty list", None),
        ({"rank": 65}, "above the smaller dimension.*65 for model.layers.0.self_attn.q_proj \\(64\\)", "at most 32"),
        ({"rank_pattern": {"[kv]_proj": 40}}, r"40 for model.layers.0.self_attn.k_proj \(32\)", "_pattern"),
        ({"rank": 40, "targets": ["k_proj", "q_proj"]}, r"40 for model.layers.0.self_attn.k_proj \(32\)", "_pattern"),
    ],
)  # fmt: skip
def test_what_matches_nothing_is_an_error_that_says_what_exists(
    tiny: LoadedModel, settings: dict[str, Any], message: str, hint: str | None
) -> None:
    """Attaching to keys that match nothing must not train nothing in silence."""
    with pytest.raises(AdapterError, match=message) as caught:
        attach(tiny.model, Adapter(**settings))
    assert hint is None or re.search(hint, caught.value.hint or "")
    assert not attached(tiny.model), "a refused adapter left wrappers behind"


def test_attention_of_a_model_without_any_is_an_error() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Sequential(nn.Linear(4, 4))]

    with pytest.raises(AdapterError, match="no attention projections"):
        attach(Mixer(), Adapter(rank=2))


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "quantized"])
@pytest.mark.parametrize("model", ["llama", "qwen3 experts", "phi3 fused qkv"])
def test_a_to_b_to_a_to_base_gives_bit_identical_logits_and_the_same_arrays(model: str, quantized: bool) -> None:
    """Every kind of layer comes off, and attaching twice is a swap."""
    base = network(model)
    if quantized:
        quantize(base, {"mode": "affine", "bits": 4, "group_size": 32})
    arrays = [(path, id(array)) for path, array in tree_flatten(base.parameters())]
    bare = np.array(base(TOKENS))
    first = build(base, Adapter(rank=2, targets="all-linear"), seed=1)
    second = build(base, Adapter(rank=4, targets=["embed_tokens", "o_proj"]), seed=2)
    noisy(first, 1)
    noisy(second, 2)

    seen = {}
    for name, wrappers in [("a", first), ("b", second), ("a again", first), ("base", {})]:
        put(base, wrappers)
        assert set(attached(base)) == set(wrappers)
        seen[name] = np.array(base(TOKENS))
    np.testing.assert_array_equal(seen["a"], seen["a again"])
    np.testing.assert_array_equal(seen["base"], bare)
    assert not np.allclose(seen["a"], seen["b"]) and not np.allclose(seen["a"], bare)
    assert [(path, id(array)) for path, array in tree_flatten(base.parameters())] == arrays


def test_attaching_twice_replaces_the_first_adapter(tiny: LoadedModel) -> None:
    attach(tiny.model, Adapter(rank=2, targets=["q_proj"]))
    wrappers = attach(tiny.model, Adapter(rank=4, targets=["v_proj"]))
    assert attached(tiny.model) == wrappers
    assert not any(hasattr(wrapper.base, "lora_a") for wrapper in wrappers.values())
    detach(tiny.model)
    assert not attached(tiny.model)
    detach(tiny.model)


def test_only_the_adapter_is_trainable_in_a_loaded_model(tiny_path: Any) -> None:
    model = load(tiny_path, quantization=Quantize(bits=4, group_size=32)).model
    assert not tree_flatten(model.trainable_parameters())
    wrappers = attach(model, Adapter(rank=4, targets="all-linear"))
    expected = {f"{path}.{name}" for path in wrappers for name in ("lora_a", "lora_b")}
    assert {name for name, _ in tree_flatten(model.trainable_parameters())} == expected


def test_a_long_prompt_through_adapted_experts_equals_their_fused_weights() -> None:
    """From 64 chosen experts on, rows are sorted by expert before they are multiplied."""
    model = network("qwen3 experts")
    wrappers = attach(model, Adapter(rank=2, targets=["gate_proj", "up_proj", "down_proj"]))
    noisy(wrappers)
    tokens = mx.arange(40)[None]
    adapted = np.array(model(tokens))
    fused = {path: wrapper.fuse() for path, wrapper in wrappers.items()}
    detach(model)
    put(model, fused)
    np.testing.assert_allclose(adapted, model(tokens), rtol=1e-3, atol=1e-3)


def test_one_seed_gives_one_adapter_and_building_leaves_the_model_alone(tiny: LoadedModel) -> None:
    before = np.array(tiny.model(TOKENS))

    def factors(seed: int) -> list[np.ndarray]:
        return [np.array(wrapper.lora_a) for wrapper in build(tiny.model, Adapter(rank=4), seed=seed).values()]

    first, other = factors(1), factors(2)
    attach(tiny.model, Adapter(rank=2, targets=["o_proj"]))
    again = factors(1)
    detach(tiny.model)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert not np.array_equal(first[0], first[1]), "two modules share one draw"
    assert not attached(tiny.model)
    np.testing.assert_array_equal(tiny.model(TOKENS), before)


def test_base_layers_are_seen_through_an_adapter_in_the_models_order(tiny: LoadedModel) -> None:
    bare = adaptable(tiny.model)
    attach(tiny.model, Adapter(rank=4))
    through = adaptable(tiny.model)
    assert list(through) == list(bare) and all(through[path] is bare[path] for path in bare)


def test_a_half_precision_model_stays_in_half_precision() -> None:
    """Float32 factors must not promote every adapted activation."""
    model = network("llama", dtype=mx.bfloat16)
    noisy(attach(model, Adapter(rank=2, targets="all-linear")))
    assert model(TOKENS).dtype == mx.bfloat16
