"""What attention and all-linear mean on each architecture of mlx_lm, and what a method makes of what it can't serve."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import attach, attached, build, detach, put
from mlx_lora.adapters.base import CONVOLUTIONS
from mlx_lora.adapters.placement import place
from mlx_lora.adapters.targets import bare_modules, find_targets, layer_prefixes
from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError
from mlx_lora.models import architectures
from mlx_lora.store.adapter import Manifest, read, save, wrappers_for
from mlx_lora.tasks.notes import named, notes
from mlx_lora.train.budget.costs import costs
from tests.adapters.zoo import network
from tests.fixed import fixed
from tests.models.tiny import mixed, plain
from tests.models.tiny.build import build as tiny_model

CONFIGS = {**plain.CONFIGS, **mixed.CONFIGS}
TOKENS = mx.arange(1, 12)[None]

QKVO, MLP = "q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj"
LATENT = "q_a_proj q_b_proj kv_a_proj_with_mqa o_proj"  # embed_q and unembed_out, one matrix a head, can't be wrapped
DELTA = f"{QKVO} b_proj f_a_proj f_b_proj g_a_proj g_b_proj"
# model -> last names of what mixes tokens, and of what all-linear adds
EXPECTED: dict[str, tuple[str, str]] = {
    "llama": (QKVO, MLP),
    "phi3": ("qkv_proj o_proj", "gate_up_proj down_proj"),
    "gpt2": ("c_attn c_proj", "c_fc c_proj"),
    "exaone": ("q_proj k_proj v_proj out_proj", "c_fc_0 c_fc_1 c_proj"),
    "talkie": ("attn_query attn_key attn_value attn_resid", "mlp_gate mlp_linear mlp_resid"),
    "Klear": (QKVO, MLP),
    "afmoe": (f"{QKVO} gate_proj", MLP),  # attention has a gate_proj too
    "dbrx": ("Wqkv out_proj", "v1 w1 w2"),
    "deepseek_v3": (LATENT, MLP),
    "deepseek_v32": (LATENT, MLP),
    "deepseek_v41": ("q_a_proj q_b_proj kv_proj gate_proj o_a_proj o_b_proj", MLP),
    "glm4_moe_lite": (LATENT, MLP),
    "glm_moe_dsa": (LATENT, MLP),
    "minimax_m3_vl": (QKVO, MLP),
    "longcat_flash": (LATENT, MLP),
    "kimi_linear": (f"{DELTA} kv_a_proj_with_mqa", MLP),
    "kimi_k3": (
        "qkv_proj b_proj f_a_proj f_b_proj g_proj q_a_proj q_b_proj kv_a_proj_with_mqa o_proj",
        f"{MLP} routed_expert_down_proj routed_expert_up_proj",
    ),
    "qwen3_next": (f"{QKVO} in_proj_qkvz in_proj_ba out_proj", MLP),
    "qwen3_5": (f"{QKVO} in_proj_qkv in_proj_z in_proj_a in_proj_b out_proj", MLP),
    "olmo_hybrid": (f"{QKVO} a_proj b_proj g_proj", MLP),
    "bailing_hybrid": ("query_key_value dense g_proj q_a_proj q_b_proj kv_a_proj_with_mqa", MLP),
    "bailing_moe_v3": (f"{QKVO} b_proj f_proj g_proj dense q_a_proj q_b_proj kv_a_proj_with_mqa", MLP),
    "nemotron_h": (f"{QKVO} in_proj out_proj", "up_proj down_proj fc1 fc2"),
    "nemotron-nas": (QKVO, f"{MLP} linear"),
    "mamba": ("in_proj x_proj dt_proj out_proj", ""),
    "mamba2": ("in_proj out_proj", ""),
    "falcon_h1": (f"{QKVO} in_proj out_proj", MLP),
    "granitemoehybrid": (f"{QKVO} in_proj out_proj", f"{MLP} input_linear output_linear"),
    "jamba": (f"{QKVO} in_proj x_proj dt_proj out_proj", MLP),
    "plamo2": ("in_proj bcdt_proj dt_proj out_proj qkv_proj o_proj", "gate_up_proj down_proj"),
    "lfm2": ("q_proj k_proj v_proj out_proj in_proj", "w1 w2 w3"),
    "lfm2_moe": ("q_proj k_proj v_proj out_proj in_proj", MLP),
    "gear": (QKVO, MLP),
    "phixtral": ("Wqkv out_proj", "fc1 fc2"),
    "gpt_oss": (QKVO, MLP),
    "mixtral": (QKVO, MLP),
    "qwen3_moe": (QKVO, MLP),
    "rwkv7": ("r_proj k_proj v_proj o_proj w_lora a_lora g_lora v_lora", "key value"),
    "gemma3n": (QKVO, f"{MLP} linear_left linear_right per_layer_input_gate per_layer_projection"),
    "gemma4_text": (QKVO, f"{MLP} per_layer_input_gate per_layer_projection"),
    "baichuan_m1": ("W_pack o_proj", MLP),
    "recurrent_gemma": (f"{QKVO} linear_x linear_y linear_out", MLP),
}
# What the tables of tiny configurations lack, because it can't run here; looking at it is enough.
EXTRA: dict[str, dict[str, Any]] = {
    "recurrent_gemma": {
        "model_type": "recurrent_gemma", "attention_bias": False, "conv1d_width": 4, "hidden_size": 32,
        "intermediate_size": 64, "logits_soft_cap": 30.0, "num_attention_heads": 2, "num_hidden_layers": 3,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "attention_window_size": 8,
        "vocab_size": 96, "block_types": ["recurrent", "recurrent", "attention"],
    },
    "bitnet": {
        "model_type": "bitnet", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 96,
    },
}  # fmt: skip


def model_of(name: str) -> nn.Module:
    """A model to be looked at, not run: nothing of it is evaluated."""
    module = import_module(f"mlx_lm.models.{name}")
    made: nn.Module = module.Model(module.ModelArgs.from_dict(dict((CONFIGS | EXTRA)[name])))
    return made.model if name == "recurrent_gemma" else made  # whose Model never becomes a module


def last_names(paths: Any) -> set[str]:
    return {next(part for part in reversed(path.split(".")) if not part.isdigit() and part != "lora") for path in paths}


@pytest.mark.parametrize("name", EXPECTED)
def test_groups_are_the_projections_of_mixers_and_every_linear_of_the_layers(name: str) -> None:
    model = model_of(name)
    attention, linear = place(model, Adapter()).methods, place(model, Adapter(targets="all-linear")).methods
    mixers, others = (set(names.split()) for names in EXPECTED[name])
    assert last_names(attention) == mixers
    assert set(attention) <= set(linear)
    assert last_names(set(linear) - set(attention)) == others


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_groups_of_every_architecture_hold_no_convolution_router_or_head(name: str) -> None:
    """Every layer with a mixer or an MLP of its own has a module in all-linear, whatever its parts are called."""
    model = model_of(name)
    modules, prefixes = bare_modules(model), layer_prefixes(model)
    found = place(model, Adapter(targets="all-linear")).methods
    assert all(path.startswith(tuple(prefixes)) for path in found)
    assert all(any(path.startswith(prefix) for path in found) for prefix in prefixes)
    assert not any(isinstance(modules[path], CONVOLUTIONS) for path in found)
    routers = {"router", "indexer", "modality_router", "shared_expert_gate", "coefficient", "wg"}
    assert not any(routers.intersection(path.split(".")) or path.endswith(".gate") for path in found)


def test_a_gate_is_a_router_beside_experts_only() -> None:
    class Gated(nn.Module):
        def __init__(self, experts: bool):
            super().__init__()
            self.gate, self.up = nn.Linear(8, 8), nn.Linear(8, 8)
            if experts:
                self.experts = [nn.Linear(8, 8)]

    assert find_targets(Gated(experts=False), Adapter(targets="all-linear")) == ["gate", "up"]
    assert find_targets(Gated(experts=True), Adapter(targets="all-linear")) == ["experts.0", "up"]


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("afm7", ["qkv_proj"], "gives its output in parts, a FusedLinear"),
        ("gemma3n", ["prediction_coefs"], "reads its weight without calling it"),
        ("kimi_k3", ["mlp_res_proj"], "reads its weight without calling it"),
        ("bitnet", "attention", "no attention projections"),
    ],
)
def test_what_a_wrapper_would_break_is_refused_by_name(name: str, targets: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message) as caught:
        attach(model_of(name), Adapter(targets=targets))
    assert name != "bitnet" or "BitLinear" in str(caught.value.hint)


def test_embeddings_whose_weight_a_tied_head_reads_are_refused() -> None:
    assert {"seed_oss", "minicpm", "llama4_text"} == architectures.READ_WHEN_TIED
    tied = {**CONFIGS["seed_oss"], "tie_word_embeddings": True}
    with pytest.raises(AdapterError, match="embed_tokens: the model reads its weight"):
        attach(tiny_model("seed_oss", tied), Adapter(targets=["embed_tokens"]))
    attach(tiny_model("seed_oss", {**tied, "tie_word_embeddings": False}), Adapter(targets=["embed_tokens"]))


# ---- small projections ----


@pytest.mark.parametrize(
    ("settings", "name", "rank", "small"),
    [
        ({}, "qwen3_5", 8, {"in_proj_a": 4, "in_proj_b": 4}),
        ({"rslora": True}, "qwen3_5", 8, {"in_proj_a": 4, "in_proj_b": 4}),
        ({"method": "dora"}, "jamba", 8, {"dt_proj": 4}),
        ({"method": "adalora"}, "qwen3_5", 8, {"in_proj_a": 4, "in_proj_b": 4}),
        ({"method": "glora"}, "qwen3_5", 8, {"in_proj_a": 4, "in_proj_b": 4}),
        ({"alpha_pattern": {"in_proj_a": 4}}, "qwen3_5", 8, {"in_proj_a": 4, "in_proj_b": 4}),
    ],
)
def test_small_projections_of_a_group_get_the_rank_they_have_and_keep_their_scale(
    settings: dict[str, Any], name: str, rank: int, small: dict[str, int]
) -> None:
    config = Adapter(rank=rank, **settings)
    wrappers = build(tiny_model(name, CONFIGS[name]), config)
    for path, wrapper in wrappers.items():
        assert wrapper.rank == small.get(path.rpartition(".")[2], rank)
        assert wrapper.scale == pytest.approx(1.0 if config.method == "glora" else config.scale_of(path))


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "glora", "vera", "qalora"])
def test_small_ranks_come_back_from_disk_with_their_scales_and_cost_what_they_hold(method: str, tmp_path: Path) -> None:
    """In mlx-lm's format they are padded with zeros; a manifest has the ranks as they are."""
    model = tiny_model("jamba", CONFIGS["jamba"])
    config = Adapter(method=method, rank=8)
    placement = place(model, config)
    wrappers = attach(model, config)
    assert list(wrappers) == list(placement.methods)
    held = sum(array.nbytes for wrapper in wrappers.values() for array in wrapper.adapter_arrays().values())
    assert costs(model, fixed(), dtype=mx.float32, gpu=False).adapter == held
    for number, wrapper in enumerate(wrappers.values()):
        for name, array in wrapper.adapter_arrays().items():
            noise = 0.05 * mx.random.normal(array.shape, key=mx.random.key(number))
            wrapper[name] = (array + noise).astype(mx.bfloat16).astype(mx.float32)
    learned = np.array(model(TOKENS))
    manifest = Manifest(
        method=method, adapter=placement.config.model_dump(), modules=list(wrappers),
        scales={path: wrapper.scale for path, wrapper in wrappers.items()},
    )  # fmt: skip
    again = wrappers_for(model, read(save(tmp_path / "adapter", wrappers, manifest, layers=3)))
    assert {path: (wrapper.rank, wrapper.scale) for path, wrapper in again.items()} == {
        path: (wrapper.rank, pytest.approx(wrapper.scale)) for path, wrapper in wrappers.items()
    }
    put(model, again)
    np.testing.assert_allclose(np.array(model(TOKENS)), learned, rtol=0, atol=1e-5)
    put(model, {path: wrapper.fuse() for path, wrapper in again.items()})  # type: ignore[misc]
    np.testing.assert_allclose(np.array(model(TOKENS)), learned, rtol=0, atol=1e-3)


def test_named_modules_stay_strict() -> None:
    model = model_of("qwen3_5")
    with pytest.raises(AdapterError, match="the rank is above the smaller dimension"):
        attach(model, Adapter(targets=["in_proj_a", "out_proj"]))
    with pytest.raises(AdapterError, match="the rank is above the smaller dimension"):
        attach(model, Adapter(rank_pattern={"in_proj_a": 6}))
    with pytest.raises(AdapterError, match="QA-LoRA|qalora"):
        attach(tiny_model("jamba", CONFIGS["jamba"]), Adapter(method="qalora", targets=["dt_proj"]))


def test_a_group_leaves_out_what_the_method_cannot_serve_and_refuses_when_nothing_is_left() -> None:
    model = model_of("jamba")
    placement = place(model, Adapter(method="qalora"))
    assert last_names(placement.left_out) == {"dt_proj"} and "dt_proj" not in last_names(placement.methods)
    experts = place(model, Adapter(method="glora", targets="all-linear")).left_out
    assert experts and all("switch_mlp" in path for path in experts)
    with pytest.raises(AdapterError, match="isn't packed"):
        place(model, Adapter(init="loftq"))


def test_the_summary_names_small_ranks_what_is_left_out_and_experts() -> None:
    model = model_of("qwen3_5")
    config = Adapter()
    said = notes(model, place(model, config), build(model, config))
    count = sum(path.endswith(("in_proj_a", "in_proj_b")) for path in place(model, config).methods)
    assert said == f"; in_proj_a, in_proj_b ({count} modules) have rank 4: they have no more"
    assert "conv1d" not in said

    model, config = model_of("jamba"), Adapter(method="qalora")
    assert "; left out: dt_proj (" in notes(model, place(model, config), build(model, config))

    model, config = model_of("qwen3_moe"), Adapter(targets="all-linear", rank=4)
    wrappers = build(model, config)
    assert "; experts: 3 stacks of 4 experts in each of" in notes(model, place(model, config), wrappers)
    assert notes(model_of("llama"), place(model_of("llama"), Adapter()), build(model_of("llama"), Adapter())) == ""
    assert named(["a.w_lora.lora.0", "a.w_lora.lora.2"]) == "lora (2 modules)"


# ---- shared layers ----


def test_a_layer_that_stands_twice_is_wrapped_once_and_seen_twice() -> None:
    model = network("llama")
    layers = model.model.layers
    model.model.layers = [layers[0], layers[1], layers[0]]
    bare = np.array(model(TOKENS))
    before = {path: id(array) for path, array in tree_flatten(model.parameters())}
    wrappers = attach(model, Adapter(rank=2, targets=["q_proj", "v_proj"]))
    assert list(wrappers) == [
        f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")
    ]
    assert attached(model)["model.layers.2.self_attn.q_proj"] is wrappers["model.layers.0.self_attn.q_proj"]
    _check_shared_gradient(model, wrappers["model.layers.0.self_attn.v_proj"], "model.layers.2.self_attn.v_proj.lora_b")
    detach(model)
    assert {path: id(array) for path, array in tree_flatten(model.parameters())} == before
    np.testing.assert_array_equal(np.array(model(TOKENS)), bare)


def test_a_projection_that_two_layers_share_is_wrapped_once_and_seen_by_both() -> None:
    model = network("llama")
    first, second = (layer.self_attn for layer in model.model.layers)
    second.v_proj = first.v_proj
    for targets in ("attention", ["v_proj"]):
        wrappers = attach(model, Adapter(rank=2, targets=targets))
        assert [path for path in wrappers if path.endswith("v_proj")] == ["model.layers.0.self_attn.v_proj"]
        assert first.v_proj is second.v_proj is wrappers["model.layers.0.self_attn.v_proj"]
    _check_shared_gradient(model, first.v_proj, "model.layers.1.self_attn.v_proj.lora_b")
    detach(model)
    assert first.v_proj is second.v_proj and not attached(model)


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_names_no_module_is_refused(setting: str) -> None:
    model = network("llama")
    with pytest.raises(AdapterError, match=f"adapter.{setting}: no module is called 'q_porj'; did you mean 'q_proj'"):
        attach(model, Adapter(rank=2, **{setting: {"q_porj": 4}}))
    attach(model, Adapter(rank=2, **{setting: {"layers.1.self_attn.(q|k)_proj": 4}}))


def _check_shared_gradient(model: nn.Module, wrapper: Any, last: str) -> None:
    """The gradient at the last place of a shared array is all of it, as a small step shows."""
    wrapper.lora_b = 0.1 * mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(1))

    def loss() -> mx.array:
        return model(TOKENS).square().mean()

    _, gradients = nn.value_and_grad(model, loss)()
    gradient = dict(tree_flatten(gradients))[last]
    start, step = wrapper.lora_b, 1e-2 * gradient / mx.linalg.norm(gradient)
    values = []
    for sign in (1, -1):
        wrapper.lora_b = start + sign * step
        values.append(float(loss().item()))
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(float(mx.linalg.norm(gradient).item()), rel=0.02)
