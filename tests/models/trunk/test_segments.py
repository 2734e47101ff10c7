"""Packed rows are the rows alone: the same logits and gradients where nothing is refused, and a reason."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter
from mlx_lora.errors import ModelError
from mlx_lora.models.trunk import packing, segments
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.packing import packing_refused
from mlx_lora.models.trunk.recompute import recomputed
from mlx_lora.models.trunk.segments import caches
from mlx_lora.models.trunk.verify import take_apart
from tests.adapters.zoo import MODELS, VOCABULARY, network

LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "attention_bias": False, "routed_scaling_factor": 1.0,
}  # fmt: skip
FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "olmo2": ("olmo2", {}),
    "starcoder2": ("starcoder2", {"norm_epsilon": 1e-5}),
    "glm4": ("glm4", {"partial_rotary_factor": 0.5, "attention_bias": False}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "mistral window": ("llama", LAYERS),
    "exaone4": ("exaone4", {"sliding_window": 4, "sliding_window_pattern": "LG", "rope_scaling": None}),
    "cohere2": ("cohere2", {"sliding_window": 4, "sliding_window_pattern": 2, "layer_norm_eps": 1e-5}),
    "gpt_oss sinks": ("gpt_oss", {**LAYERS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma4 shared keys": ("gemma4_text", {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 4, "global_head_dim": 16,
        "layer_types": LAYERS["layer_types"] * 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96,
    }),
    "ministral3": ("ministral3", {"rope_parameters": {
        "rope_theta": 10000.0, "llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 64,
    }}),
    "longcat cache pairs": ("longcat_flash", {
        **LATENT, "attention_method": "MLA", "zero_expert_type": "identity", "ffn_hidden_size": 128, "moe_topk": 2,
        "expert_ffn_hidden_size": 64, "n_routed_experts": 4, "zero_expert_num": 2, "num_layers": 2,
        "mla_scale_q_lora": True, "mla_scale_kv_lora": True,
    }),
}  # fmt: skip
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "learned positions": ("gpt2", {
        "n_ctx": 128, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128, "layer_norm_epsilon": 1e-5,
    }, "don't give the states of the rows alone"),
    "norm after rotation": ("hunyuan_v1_dense", {"use_qk_norm": True}, "don't give the states of the rows alone"),
    "state space": ("mamba", {
        "state_size": 8, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4,
    }, "its layers keep a state that runs across rows"),
    "chunks": ("llama4", {"text_config": {
        "attention_bias": False, "attention_chunk_size": 8, "head_dim": 16, "hidden_size": 64, "num_hidden_layers": 4,
        "interleave_moe_layer_step": 1, "intermediate_size": 64, "intermediate_size_mlp": 64, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128, "model_type": "llama4_text", "num_attention_heads": 4, "use_qk_norm": True,
        "num_experts_per_tok": 1, "num_key_value_heads": 2, "num_local_experts": 2, "rope_scaling": None,
        "rope_theta": 1e4, "vocab_size": VOCABULARY,
    }}, "cut into chunks"),
}  # fmt: skip
NAMES = [*MODELS, *FURTHER]
WINDOWED = ["gemma3", "mistral window", "exaone4", "cohere2", "gpt_oss sinks", "gemma4 shared keys"]
ROWS = ((7, 12, 5), (9, 14))
WIDTH = 26


@pytest.fixture(autouse=True)
def further_models(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, model in (FURTHER | {name: (kind, changes) for name, (kind, changes, _) in REFUSED.items()}).items():
        monkeypatch.setitem(MODELS, name, model)


def spans() -> Iterator[tuple[int, int, int]]:
    """(packed row, start, end) of every row."""
    for line, lengths in enumerate(ROWS):
        for place, length in enumerate(lengths):
            yield line, sum(lengths[:place]), sum(lengths[:place]) + length


def packed() -> tuple[mx.array, mx.array]:
    """(tokens, segment ids), both (2, WIDTH), the last positions of a line being padding."""
    tokens = np.random.default_rng(3).integers(1, VOCABULARY, (len(ROWS), WIDTH))
    ids = [np.repeat(range(1, len(row) + 2), [*row, WIDTH - sum(row)]) % (len(row) + 1) for row in ROWS]
    return mx.array(tokens), mx.array(np.stack(ids), dtype=mx.int32)


def furthest(model: nn.Module, logits: mx.array, tokens: mx.array) -> float:
    """The largest difference between the packed logits and those of each row alone."""
    return max(
        mx.abs(logits[line, start:end] - model(tokens[line : line + 1, start:end])[0]).max().item()
        for line, start, end in spans()
    )


@pytest.mark.parametrize("name", NAMES)
def test_packed_logits_are_those_of_each_row_alone_and_only_when_isolated(name: str) -> None:
    model = network(name)
    tokens, ids = packed()
    logits = model(tokens, cache=caches(model, ids))
    for line, start, end in spans():
        alone = model(tokens[line : line + 1, start:end])[0]
        np.testing.assert_allclose(logits[line, start:end], alone, rtol=1e-4, atol=1e-4)
    assert furthest(model, model(tokens), tokens) > 0.02
    assert packing_refused(take_apart(model)) is None
    if (parts := take_apart(model)).apart:
        hidden = parts.run(tokens, segments=ids)
        head = parts.head(hidden.reshape(-1, hidden.shape[-1]))
        np.testing.assert_allclose(head, logits.reshape(head.shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_are_kept_and_a_model_whose_window_is_lost_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(name)
    within = segments._Masks.within
    monkeypatch.setattr(segments._Masks, "within", lambda self, window: within(self, None))
    tokens, ids = packed()
    assert furthest(model, model(tokens, cache=caches(model, ids)), tokens) > 0.02
    assert packing_refused(take_apart(model)) == "packed rows don't give the states of the rows alone"


def test_padding_changes_no_row() -> None:
    model = network("gemma3")
    tokens, ids = packed()
    other = mx.where(ids == 0, 50, tokens)
    logits = [np.array(model(each, cache=caches(model, ids)))[np.array(ids) > 0] for each in (tokens, other)]
    np.testing.assert_array_equal(*logits)


def trained(name: str) -> nn.Module:
    """A model whose adapter isn't the identity any more, in training mode."""
    model = network(name)
    for place, wrapper in enumerate(attach(model, Adapter(rank=2, targets="all-linear")).values()):
        wrapper.lora_b = 0.1 * mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(place))
    return model.train()


def loss(logits: mx.array, tokens: mx.array, ids: mx.array) -> mx.array:
    """Σ nll of every token but the first of its row."""
    carries = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] > 0)
    return (nn.losses.cross_entropy(logits[:, :-1], tokens[:, 1:]) * carries).sum()


def packed_loss(model: nn.Module, tokens: mx.array, ids: mx.array) -> mx.array:
    return loss(model(tokens, cache=caches(model, ids)), tokens, ids)


def assert_gradients_equal(model: nn.Module, gradients: dict[str, Any]) -> None:
    """Compare with the sum over the rows, each alone."""
    tokens, ids = packed()

    def alone(model: nn.Module) -> mx.array:
        rows = [(tokens[line : line + 1, start:end], ids[line : line + 1, start:end]) for line, start, end in spans()]
        return sum((loss(model(row), row, numbers) for row, numbers in rows), start=mx.array(0.0))

    expected = dict(tree_flatten(nn.value_and_grad(model, alone)(model)[1]))
    found = dict(tree_flatten(gradients))
    assert found.keys() == expected.keys()
    assert max(np.abs(array).max() for array in expected.values()) > 0.1
    for path, array in expected.items():
        scale = max(1.0, np.abs(array).max())
        np.testing.assert_allclose(found[path] / scale, array / scale, rtol=1e-4, atol=1e-4, err_msg=path)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_rows_alone(name: str) -> None:
    model = trained(name)
    _, gradients = nn.value_and_grad(model, packed_loss)(model, *packed())
    assert_gradients_equal(model, gradients)


@pytest.mark.parametrize(
    ("name", "compiled"),
    [("llama", True), ("gemma2 soft caps", False), ("gemma3", False), ("gemma4 shared keys", False)],
)
def test_gradients_recomputed_and_compiled(name: str, compiled: bool) -> None:
    model = trained(name)
    step = nn.value_and_grad(model, packed_loss)

    def forward(tokens: mx.array, ids: mx.array) -> Any:
        return step(model, tokens, ids)

    with recomputed(layers_of(model)):
        state = [model.state]
        _, gradients = (mx.compile(forward, inputs=state, outputs=state) if compiled else forward)(*packed())
        mx.eval(gradients)
    assert_gradients_equal(model, gradients)


def test_a_compiled_pass_follows_the_segments_it_is_given() -> None:
    model = network("gemma3")
    forward = mx.compile(lambda tokens, ids: model(tokens, cache=caches(model, ids)))
    tokens, ids = packed()
    for each in (ids, mx.ones_like(ids), ids[::-1]):
        np.testing.assert_allclose(
            forward(tokens, each), model(tokens, cache=caches(model, each)), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("window", [None, 3, 100])
def test_the_mask_joins_a_position_to_earlier_ones_of_its_row(window: int | None) -> None:
    _, ids = packed()
    mask = caches(network("llama"), ids)[0].make_mask(WIDTH, return_array=False, window_size=window)
    rows = np.array(ids)
    later, earlier = np.arange(WIDTH)[:, None], np.arange(WIDTH)[None]
    expected = (rows[:, :, None] == rows[:, None]) & (earlier <= later) & (later - earlier < (window or WIDTH))
    assert mask.dtype == mx.bool_
    np.testing.assert_array_equal(mask, expected[:, None])


def test_layers_share_one_mask_a_window() -> None:
    first, last = caches(network("gemma3"), packed()[1])
    assert first.make_mask(WIDTH) is last.make_mask(WIDTH, window_size=WIDTH)
    assert first.make_mask(WIDTH, window_size=4) is last.make_mask(WIDTH, window_size=4)
    with pytest.raises(ModelError, match="a mask over 3 of 26"):
        first.make_mask(3)


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_with_the_reason(name: str) -> None:
    reason = packing_refused(take_apart(network(name)))
    assert reason is not None
    assert re.search(REFUSED[name][2], reason)


def test_no_caches_for_layers_with_chunks() -> None:
    with pytest.raises(ModelError, match="rows can't be packed for llama4: its attention is cut into chunks"):
        caches(network("chunks"), packed()[1])


def test_positions_that_count_only_when_they_are_large_are_found_there() -> None:
    model = network("ministral3")
    assert packing_refused(take_apart(model), length=64) is None
    assert packing_refused(take_apart(model), length=128) == "packed rows don't give the states of the rows alone"
    assert packing_refused(take_apart(network("llama")), length=32768) is None


class Deaf(nn.Module):
    """A model that takes a cache and doesn't use it, or can't be given one."""

    def __init__(self, *, takes: bool):
        super().__init__()
        self.inner = network("llama")
        self.layers = self.inner.layers
        self.takes = takes

    def __call__(self, tokens: mx.array, **named: object) -> mx.array:
        if named and not self.takes:
            raise TypeError("no cache here")
        return self.inner(tokens)


def test_a_model_that_ignores_or_rejects_the_mask_is_refused() -> None:
    assert packing_refused(take_apart(Deaf(takes=True))) == "packed rows don't give the states of the rows alone"
    assert packing_refused(take_apart(Deaf(takes=False))) == "it can't be run on packed rows: no cache here (TypeError)"


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_measured_by_its_own_tolerance(dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("gemma3", dtype=dtype)
    assert packing_refused(take_apart(model)) is None
    monkeypatch.setattr(packing, "caches", lambda *_, **__: None)
    assert packing_refused(take_apart(model)) is not None


def test_the_trial_is_without_dropout_and_leaves_the_mode() -> None:
    model = network("llama")
    attach(model, Adapter(rank=2, targets="all-linear", dropout=0.5))
    for wrapper in model.modules():
        if "lora_b" in wrapper:
            wrapper.lora_b = mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(1))
    assert packing_refused(take_apart(model.train())) is None
    assert all(module.training for module in model.modules())
    packing_refused(take_apart(model.eval()))
    assert not model.training
