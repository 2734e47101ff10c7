"""What a step keeps, counted and measured, and the choice that follows from it."""

from __future__ import annotations

import gc
from importlib import import_module

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter, Train
from mlx_lora.data.encode import Row
from mlx_lora.models.load import LoadedModel
from mlx_lora.models.split import layers_of, split
from mlx_lora.train import memory
from mlx_lora.train.events import Note, Step
from mlx_lora.train.trainer import train
from tests.adapters.zoo import COMMON

ROWS = [Row(np.arange(257, dtype=np.int32) % 60 + 1, np.array([0.0] * 249 + [1.0] * 8, np.float32))] * 4


def llama(layers: int) -> nn.Module:
    module = import_module("mlx_lm.models.llama")
    sizes = {"num_hidden_layers": layers, "hidden_size": 128, "intermediate_size": 512, "head_dim": 32}
    model: nn.Module = module.Model(module.ModelArgs.from_dict({"model_type": "llama", **COMMON, **sizes}))
    model.freeze()
    mx.eval(model.parameters())
    return model


def notes_and_steps(model: nn.Module, **settings: object) -> tuple[list[str], list[Step]]:
    gc.collect()  # what other tests have left must not be freed on the way
    chosen = Train(**{"iters": 2, "batch_size": 4, **settings})
    events = list(train(model, ROWS, [], chosen, split=split(model)))
    return [e.text for e in events if isinstance(e, Note)], [e for e in events if isinstance(e, Step)]


def test_what_is_counted_is_what_layers_keep() -> None:
    """Measured as what another eight layers add to the peak; MLX must not run ahead for that."""
    peaks = []
    for layers in (4, 12):
        model = llama(layers)
        attach(model, Adapter(rank=4, targets="all-linear"))
        peaks.append(notes_and_steps(model, grad_checkpoint="off")[1][0].peak_memory)
    model = llama(8)
    attach(model, Adapter(rank=4, targets="all-linear"))
    counted = memory.kept_bytes(layers_of(model), 4 * 256, mx.float32)
    weights = sum(array.nbytes for layer in layers_of(model) for _, array in tree_flatten(layer.parameters()))
    assert counted == pytest.approx(peaks[1] - peaks[0] - weights, rel=0.35)


@pytest.mark.parametrize(("free", "recomputes"), [(1 << 40, False), (1 << 10, True)])
def test_auto_recomputes_where_a_step_would_not_fit(
    free: int, recomputes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: free)
    model = llama(6)
    attach(model, Adapter(rank=4))
    said, steps = notes_and_steps(model)
    attach(model, Adapter(rank=4))
    assert bool(said) == recomputes and all("gradient checkpointing is on" in text for text in said)
    _, without = notes_and_steps(model, grad_checkpoint="off")
    assert (steps[-1].peak_memory < 0.8 * without[-1].peak_memory) == recomputes
    assert steps[0].loss == pytest.approx(without[0].loss, rel=1e-5)


def test_free_memory_is_that_of_this_machine(tiny: LoadedModel) -> None:
    assert 0 < memory.free_bytes() < 1 << 42
