"""Every architecture that mlx_lm has, tiny: LoRA's gradients, run in every way there is, are those of plain autodiff.

The reference is the unmodified model: its own logits at every position, of each row by itself, and MLX's autodiff. A
dozen architectures run by default, the others are marked `real`.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter
from mlx_lora.data.batch import Batch, collate
from mlx_lora.data.rows import Row
from mlx_lora.errors import ModelError
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.lean import lean
from mlx_lora.models.trunk.packing import packing_refused
from mlx_lora.models.trunk.recompute import recomputed
from mlx_lora.models.trunk.trunk import Trunk
from mlx_lora.models.trunk.verify import Verified, take_apart, verify, verify_start
from mlx_lora.train.objectives.likelihood import Loss, as_arrays, negative_log_likelihood
from tests.models.tiny import mixed, plain
from tests.models.tiny.build import build

CONFIGS = {**plain.CONFIGS, **mixed.CONFIGS}
UNCOVERED = {**plain.UNCOVERED, **mixed.UNCOVERED}
# Run by default: a kind of each.
DOZEN = (
    "llama", "gemma2", "gemma3_text", "gemma3n", "gpt_oss", "qwen3_moe", "deepseek_v3", "kimi_linear", "qwen3_5",
    "qwen3_next", "nemotron_h", "lfm2", "granitemoehybrid",
)  # fmt: skip
# Where neither lean layers nor gradient checkpointing may be left out.
NEVER_LEFT_OUT = (
    "qwen3_5", "qwen3_next", "nemotron_h", "lfm2", "granitemoehybrid", "kimi_linear", "deepseek_v3", "gpt_oss",
    "gemma3n", "deepseek_v2", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "kimi_vl", "kimi_k25", "kimi_k3",
    "longcat_flash", "longcat_flash_ngram", "mistral4", "minicpm3", "bailing_hybrid", "bailing_moe_v3", "youtu_llm",
)  # fmt: skip
# mlx_lm's own code has no gradient: refused by name before the first step.
WITHOUT_GRADIENT = ("deepseek_v41",)
# Its block-sparse attention lets positions see later ones, padding included: rows of one length have none.
NOT_CAUSAL = ("phi3small",)
# Its layers share keys through the cache that it is served with, and have keys of their own without one.
OTHERS_WITH_A_CACHE = ("gemma3n",)
TOLERANCE = 1e-3
LENGTHS, ONE_LENGTH = (19, 12, 17), (17, 17, 17)

Gradients = dict[str, mx.array]


def cases() -> list[Any]:
    return [
        pytest.param(name, marks=() if name in DOZEN else pytest.mark.real)
        for name in sorted(CONFIGS)
        if name not in WITHOUT_GRADIENT
    ]


def adapted(name: str, *, layers: Any = "all") -> nn.Module:
    """A tiny model with LoRA on the default targets, whose update isn't zero."""
    model = build(name, CONFIGS[name])
    for index, wrapper in enumerate(attach(model, Adapter(rank=2, layers=layers)).values()):
        wrapper.lora_b = 0.1 * mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(index))
    return model


def rows(lengths: tuple[int, ...] = LENGTHS) -> list[Row]:
    """Rows with loss on their last third."""
    draw = np.random.default_rng(0)
    made = []
    for length in lengths:
        weights = np.zeros(length, np.float32)
        weights[2 * length // 3 :] = 1.0
        made.append(Row(draw.integers(1, 96, length).astype(np.int32), weights))
    return made


def of_the_unmodified_model(model: nn.Module, all_rows: list[Row], *, served: bool = False) -> Gradients:
    """Loss and gradients of Σ weight · nll, each row by itself, over the model's own logits; `served`: with a cache."""

    def loss(tokens: mx.array, weights: mx.array) -> mx.array:
        logits = model(tokens[None, :-1], cache=make_prompt_cache(model) if served else None)[0]
        return (negative_log_likelihood(logits, tokens[1:]) * weights[1:]).sum()

    model.train()
    total: Gradients = {}
    for row in all_rows:
        value, gradients = nn.value_and_grad(model, loss)(mx.array(row.tokens), mx.array(row.weights))
        found = {"loss": value, **dict(tree_flatten(gradients))}
        total = {path: array + total[path] if total else array for path, array in found.items()}
    mx.eval(total)
    return total


def of_ours(trunk: Trunk, batch: Batch, *, start: int = 0, columns: bool = False) -> Gradients:
    places = batch.columns() if columns else None
    assert not columns or places is not None, "the rows have no columns: this test means nothing"
    states = None
    if start:
        states = trunk.entering(mx.array(batch.inputs), start)
    trunk.model.train()
    loss = Loss(trunk, start=start)
    value, gradients = nn.value_and_grad(trunk.model, loss.differentiable)(as_arrays(batch, states, places))
    return {"loss": value, **dict(tree_flatten(gradients))}


def assert_same(ours: Gradients, theirs: Gradients, way: str) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(mx.linalg.norm(array).item() for path, array in theirs.items() if path != "loss")
    for path, array in theirs.items():
        allowed = TOLERANCE * max(mx.linalg.norm(array).item(), 1e-2 * largest)
        away = mx.linalg.norm(ours[path] - array).item()
        assert away <= allowed, f"{way}: {path} is off by {away / max(mx.linalg.norm(array).item(), 1e-30):.2g}"


def ways(model: nn.Module, trunk: Trunk, verified: Verified, all_rows: list[Row]) -> dict[str, Gradients]:
    """Gradients in every way that holds for this model."""
    layers, batch, found = layers_of(model), collate(all_rows), {}
    with lean(layers, without=verified.without):
        found["lean"] = of_ours(trunk, batch)
        if verified.columns:
            found["last layer"] = of_ours(trunk, batch, columns=True)
        if verified.recompute:
            with recomputed(layers):
                found["recompute"] = of_ours(trunk, batch)
        if packing_refused(trunk, without=verified.without) is None:
            packed = collate(all_rows, [[0, 1], [2]], packed=True)
            found["packing"] = of_ours(trunk, packed)
            if verified.recompute:
                with recomputed(layers):
                    found["packing, recompute"] = of_ours(trunk, packed)
            if verified.columns and packed.columns() is not None:
                found["packing, last layer"] = of_ours(trunk, packed, columns=True)
    return found


@pytest.mark.parametrize("name", cases())
def test_gradients_are_those_of_the_unmodified_model(name: str) -> None:
    model = adapted(name)
    all_rows = rows(ONE_LENGTH if name in NOT_CAUSAL else LENGTHS)
    expected = of_the_unmodified_model(model, all_rows, served=name in OTHERS_WITH_A_CACHE)
    model.eval()
    trunk = take_apart(model)
    assert trunk.shares_keys == (name in OTHERS_WITH_A_CACHE)
    verified = verify(trunk, recompute=True, columns=True)
    if name in NEVER_LEFT_OUT:
        assert not verified.without and verified.recompute, verified.notes
    for way, gradients in ways(model, trunk, verified, all_rows).items():
        assert_same(gradients, expected, way)


@pytest.mark.parametrize("name", cases())
def test_gradients_above_kept_states_are_those_of_the_unmodified_model(name: str) -> None:
    model = adapted(name, layers=1)
    expected = of_the_unmodified_model(model, rows(), served=name in OTHERS_WITH_A_CACHE)
    model.eval()
    trunk, start = take_apart(model), len(layers_of(model)) - 1
    if isinstance(reason := verify_start(trunk, start), str):
        assert reason, "left out, by name"
        return
    verified = verify(trunk, recompute=False, columns=True)
    with ExitStack() as stack:
        stack.enter_context(lean(layers_of(model), without=verified.without))
        assert_same(of_ours(trunk, collate(rows()), start=start), expected, "kept states")
        if verified.columns:
            columns = of_ours(trunk, collate(rows()), start=start, columns=True)
            assert_same(columns, expected, "kept states, last layer")


@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_a_model_whose_layers_have_no_gradient_is_refused_by_name(name: str) -> None:
    with pytest.raises(ModelError, match=f"{name} can't be trained here: its DecoderLayer has no gradient"):
        verify(take_apart(adapted(name)), recompute=True, columns=True)


def test_at_least_a_hundred_architectures_are_covered_and_the_others_have_a_reason() -> None:
    assert len(set(CONFIGS) - set(WITHOUT_GRADIENT)) >= 100
    assert set(DOZEN) | set(NEVER_LEFT_OUT) <= set(CONFIGS)
    assert all(UNCOVERED.values()) and not set(UNCOVERED) & set(CONFIGS)
