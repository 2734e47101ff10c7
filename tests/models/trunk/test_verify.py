"""What doesn't hold for a model is found by its values and gradients, and left out by name; what holds costs little."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter
from mlx_lora.errors import ModelError, TrainingError
from mlx_lora.machine import facts
from mlx_lora.models import recurrence
from mlx_lora.models.trunk import attention, lean, trial, verify
from mlx_lora.models.trunk.arrays import arrays_kept
from mlx_lora.models.trunk.flatten import flattened, objects_in
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.trial import kinds
from mlx_lora.models.trunk.trunk import Trunk
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.train.events import Evaluated, Note, Step
from mlx_lora.train.trainer import train
from tests.adapters import zoo
from tests.fixed import fixed
from tests.models.test_every_architecture import adapted, rows
from tests.models.tiny import mixed
from tests.models.tiny.build import build


def verified(model: nn.Module) -> verify.Verified:
    return verify.verify(take_apart(model), recompute=True, columns=True)


def test_a_gradient_that_lean_attention_drops_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was: zeros for the gradient of a mask that latent attention fills with scores of trained positions."""
    assert not verified(adapted("deepseek_v3")).notes
    monkeypatch.setattr(attention, "_gradient_of", lambda mask, parts: mx.zeros_like(mask))
    attention._attention.cache_clear()
    found = verified(adapted("deepseek_v3"))
    attention._attention.cache_clear()
    assert found.without == {"attention"} and found.recompute
    reason = "which needs more memory: the lean form gives other numbers"
    assert found.notes == [f"deepseek_v3 runs attention in mlx-lm's own code, {reason}"]


class Borrowing(type(layers_of(zoo.network("llama"))[0])):  # type: ignore[misc]
    """A layer that computes with a trained array of another one, which isn't its own."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        return super().__call__(x, mask, cache) * self.__dict__["lender"].self_attn.q_proj.lora_a.sum()


def test_layers_that_use_what_is_trained_elsewhere_keep_their_gradient_or_are_refused() -> None:
    """Computed again, a layer sees the arrays of its own and those it is handed: others would get zeros."""
    model = zoo.network("llama")
    attach(model, Adapter(rank=2))
    first, last = layers_of(model)
    last.__dict__["lender"] = first
    last.__class__ = Borrowing
    found = verified(model)
    assert not found.recompute
    assert "layers of llama aren't computed again in the backward pass" in found.notes[0]


def test_a_device_without_the_gradient_is_refused_before_the_first_step() -> None:
    """As MLX's kernels without a vjp behave on a GPU."""
    model = zoo.network("llama")
    attach(model, Adapter(rank=2))

    class Kernel(type(layers_of(model)[0])):  # type: ignore[misc]
        def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
            return mx.view(super().__call__(x, mask, cache), mx.int32).view(mx.float32)

    layers_of(model)[0].__class__ = Kernel
    with pytest.raises(ModelError, match="llama can't be trained here: its Kernel has no gradient"):
        verified(model)
    with pytest.raises(TrainingError, match="its Kernel has no gradient"):
        list(train(model, rows(), [], fixed(iters=1), trunk=take_apart(model)))


def test_one_layer_of_each_kind_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(zoo.COMMON, "num_hidden_layers", 30)
    model = zoo.network("llama")
    attach(model, Adapter(rank=2, layers=10))
    calls = trial.trial_run(take_apart(model)).calls
    assert len(calls) == 30 and len(kinds(calls)) == 2, "with an adapter, and without"
    assert [call.frozen for call in calls] == [True] * 20 + [False] * 10
    hybrid = build("qwen3_5", mixed.CONFIGS["qwen3_5"])
    attach(hybrid, Adapter(rank=2))
    assert len(kinds(trial.trial_run(take_apart(hybrid)).calls)) == 2


def test_frozen_layers_do_not_stand_for_those_above_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter on attention alone: the recurrence above it isn't adapted, and its gradient is needed all the same."""
    config = copy.deepcopy(mixed.CONFIGS["qwen3_5"])
    config["text_config"] |= {"num_hidden_layers": 8, "full_attention_interval": 4}

    def dropping(q: mx.array, *others: Any, **named: Any) -> Any:
        return recurrence.gated_delta_update(mx.stop_gradient(q), *others, **named)

    functions = [
        (part, name, theirs, dropping if name == "gated_delta_update" else ours)
        for part, name, theirs, ours in lean.FUNCTIONS
    ]
    monkeypatch.setattr(lean, "FUNCTIONS", functions)
    lean._lean_class.cache_clear()
    model = build("qwen3_5", config)
    for wrapper in attach(model, Adapter(rank=2, targets=["q_proj"])).values():
        wrapper.lora_b = 0.1 * mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(1))
    found = verified(model)
    lean._lean_class.cache_clear()
    assert found.without == {"recurrence"}


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2", "llama"])
def test_a_kept_prefix_of_packed_rows_changes_nothing(name: str) -> None:
    """States are reset where packed rows begin also below the adapter, whose states are computed once and kept."""
    losses = []
    for kept in ("off", "on"):
        model = adapted(name, layers=1)
        settings = fixed(iters=4, batch_size=3, learning_rate=0.01, warmup=0.0, cache_prefix=kept)
        events = train(model, rows() + rows(), [], settings, trunk=take_apart(model), packing=True)
        losses.append([event.loss for event in events if isinstance(event, Step)])
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_without_a_trunk_the_model_is_taken_apart() -> None:
    model = adapted("llama")
    (step,) = (event for event in train(model, rows(), [], fixed(iters=1)) if isinstance(event, Step))
    assert np.isfinite(step.loss)


def test_a_trial_of_another_adapter_is_run_again() -> None:
    model = zoo.network("llama")
    trunk = take_apart(model)
    before = trunk.trial
    assert before is not None and trial.trial_run(trunk) is before
    attach(model, Adapter(rank=2))
    assert trial.trial_run(trunk) is not before


def test_verifying_leaves_model_mode_and_arrays_alone() -> None:
    for name in ("gemma3n", "kimi_k3", "llama"):
        model = adapted(name)
        before = [(path, id(array)) for path, array in tree_flatten(model.parameters())]
        classes = [type(module) for module in model.modules()]
        verified(model)
        assert [(path, id(array)) for path, array in tree_flatten(model.parameters())] == before, name
        assert [type(module) for module in model.modules()] == classes and not model.training


def test_a_model_that_shares_keys_through_its_cache_is_trained_as_it_is_served() -> None:
    model = build("gemma3n", mixed.CONFIGS["gemma3n"])
    trunk, tokens = take_apart(model), mx.array([[5, 9, 70, 2, 33]])
    assert trunk.shares_keys and not take_apart(zoo.network("gemma3")).shares_keys
    served = model(tokens, cache=model.make_cache())
    np.testing.assert_allclose(trunk.head(trunk.run(tokens)[0]), served[0], rtol=1e-4, atol=1e-4)
    assert not np.allclose(model(tokens), served, atol=0.1)


@pytest.mark.real
@pytest.mark.parametrize("name", ["dbrx", "gemma3n"])
def test_what_cant_be_compiled_runs_uncompiled_with_a_note(name: str) -> None:
    """dbrx chooses its experts on the host. Gemma 3n exchanges arrays of its own on the way, which are put back.

    Where MLX can't compile at all, for want of g++, nothing is to be said of one model.
    """
    model = adapted(name)
    if name == "gemma3n":
        model.model.language_model.config.altup_coef_clip = 0.01  # so that it changes its weights
        for layer in layers_of(model):
            layer.altup.config.altup_coef_clip = 0.01
    base = {path: array for path, array in tree_flatten(model.parameters()) if "lora" not in path}
    settings = fixed(iters=2, batch_size=3, eval_every=1, learning_rate=0.01, warmup=0.0)
    events = list(train(model, rows(), rows(), settings, trunk=take_apart(model)))
    notes = [event.text for event in events if isinstance(event, Note) and "compiled" in event.text]
    assert len(notes) == (name == "dbrx" and facts.collect()["compiled_kernels"])
    now = dict(tree_flatten(model.parameters()))
    assert all(mx.array_equal(array, now[path]) for path, array in base.items())
    losses = [event.loss for event in events if isinstance(event, Evaluated)]
    assert losses[-1] < losses[0]
    assert all(np.isfinite(event.loss) for event in events if isinstance(event, Step))


def test_arrays_are_kept_whatever_a_pass_does_to_them() -> None:
    linear = nn.Linear(2, 2)
    linear.kept = None
    weight = linear.weight
    with pytest.raises(ZeroDivisionError), arrays_kept(linear):
        linear.weight, linear.kept = mx.ones((2, 2)), mx.ones(2)
        raise ZeroDivisionError
    assert linear.weight is weight and linear.kept is None
    assert list(linear) == ["weight", "bias"], "a compiled step knows arrays by their order"


def test_what_layers_carry_is_flattened_and_comes_back() -> None:
    from mlx_lm.models.kimi_k3 import ResidualBlocks

    blocks = ResidualBlocks(1e-5)
    blocks.append(mx.ones((1, 2)))
    tree = ("causal", {"blocks": blocks, "x": mx.zeros(3)}, [mx.ones(1), None])
    arrays, rebuild = flattened(tree)
    assert len(arrays) == 4
    mode, named, rest = rebuild([array + 1 for array in arrays])
    assert mode == "causal" and rest[1] is None and isinstance(rest, list)
    assert named["blocks"] is not blocks and named["blocks"].raw.tolist() == [[[2.0, 2.0]]]
    assert blocks.raw.tolist() == [[[1.0, 1.0]]] and objects_in(tree) == [blocks]


def test_a_trunk_that_cant_be_taken_apart_is_run_whole() -> None:
    model = zoo.network("llama")
    trunk = Trunk(model, vocabulary=zoo.VOCABULARY)
    tokens = mx.array([[5, 9, 70]])
    np.testing.assert_array_equal(trunk.head(trunk.run(tokens)), model(tokens))
