"""Gradient checkpointing: the same gradients, dropout included, less memory, and nothing left behind."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter
from mlx_lora.models.load import LoadedModel
from mlx_lora.models.trunk.dropout import Dropout
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.recompute import recomputed
from mlx_lora.models.trunk.trunk import Trunk
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.train.objectives.likelihood import Loss
from tests.conftest import VOCABULARY

ARRAYS = {
    "inputs": mx.arange(64).reshape(2, 32),
    "positions": mx.arange(64),
    "targets": mx.arange(64) % 50,
    "weights": mx.ones(64),
}


def gradients(model: nn.Module) -> dict[str, mx.array]:
    """Gradients of one batch, with every dropout layer's mask fixed by its place."""
    model.train()
    _, tree = nn.value_and_grad(model, Loss(take_apart(model)))(ARRAYS)
    model.eval()
    return dict(tree_flatten(tree))


def test_gradients_are_the_same(tiny: LoadedModel) -> None:
    for wrapper in attach(tiny.model, Adapter(rank=4)).values():
        wrapper.lora_b = 0.1 * mx.ones_like(wrapper.lora_b)
    plain = gradients(tiny.model)
    with recomputed(layers_of(tiny.model)):
        again = gradients(tiny.model)
    for name, array in plain.items():
        np.testing.assert_allclose(again[name], array, rtol=1e-5, atol=1e-7, err_msg=name)


def test_dropout_draws_the_same_mask_in_both_passes(tiny: LoadedModel) -> None:
    """With a mask drawn anew in the recomputation, the gradient would not match finite differences of the forward."""
    wrappers = attach(tiny.model, Adapter(rank=4, dropout=0.5, layers=1, targets=["v_proj"]))
    (wrapper,) = wrappers.values()
    wrapper.lora_b = 0.3 * mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(1))
    loss_sum = Loss(take_apart(tiny.model))
    tiny.model.train()
    with recomputed(layers_of(tiny.model)):
        mx.random.seed(5)
        _, tree = nn.value_and_grad(tiny.model, loss_sum)(ARRAYS)
        gradient = next(array for name, array in tree_flatten(tree) if name.endswith("lora_a"))
        mx.eval(gradient)
        original, direction = wrapper.lora_a, mx.random.normal(wrapper.lora_a.shape, key=mx.random.key(2))
        values = []
        for step in (1e-3, -1e-3):
            wrapper.lora_a = original + step * direction
            mx.random.seed(5)
            values.append(loss_sum(ARRAYS).item())
    expected = (gradient * direction).sum().item()
    assert abs((values[0] - values[1]) / 2e-3 - expected) < 0.02 * abs(expected) + 1e-3


def test_classes_come_back_and_no_class_is_patched(tiny: LoadedModel) -> None:
    layers = layers_of(tiny.model)
    cls, call = type(layers[0]), type(layers[0]).__call__
    try:
        with recomputed(layers):
            assert type(layers[0]) is not cls
            raise RuntimeError
    except RuntimeError:
        pass
    assert all(type(layer) is cls for layer in layers) and cls.__call__ is call


def test_less_memory_is_kept(tiny: LoadedModel) -> None:
    attach(tiny.model, Adapter(rank=4))
    wide = {"inputs": mx.zeros((8, 256), mx.int32)} | {
        name: mx.arange(16) for name in ("positions", "targets", "weights")
    }
    peaks = []
    for layers in ([], layers_of(tiny.model)):
        with recomputed(layers):
            tiny.model.train()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            mx.eval(nn.value_and_grad(tiny.model, Loss(Trunk(tiny.model, vocabulary=VOCABULARY)))(wide)[1])
            peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 0.8 * peaks[0], peaks


def test_dropout_mask_is_fixed_by_a_key_and_freed_by_none() -> None:
    dropout = Dropout(0.5)
    x = mx.ones((64, 64))
    dropout.drawn_from(mx.random.key(3))
    assert mx.array_equal(dropout(x), dropout(x))
    dropout.drawn_from(None)
    assert not mx.array_equal(dropout(x), dropout(x))
