"""Packed rows train as the rows alone do: the same losses, gradients and steps, and a reason where that can't be."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter
from mlx_lora.data import batch
from mlx_lora.data.batch import collate, pack
from mlx_lora.data.rows import Row
from mlx_lora.errors import TrainingError
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.train.events import Evaluated, Finished, Step
from mlx_lora.train.objectives.likelihood import Arrays, Loss, as_arrays
from mlx_lora.train.trainer import train
from tests.adapters import zoo
from tests.fixed import fixed
from tests.train.test_trainer import arrays_of, make_rows, of

ROWS = make_rows(12)
MODELS = ["llama", "qwen3", "gemma3"]
SGD = {"optimizer": "sgd", "learning_rate": 0.05, "max_grad_norm": None, "schedule": "constant"}


@pytest.fixture(autouse=True)
def short_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several lines of several rows each."""
    monkeypatch.setattr(batch, "PACKED_POSITIONS", 60)


def adapted(name: str, **adapter: Any) -> nn.Module:
    """A model of the zoo with adapters that already do something."""
    model = zoo.network(name)
    wrappers = attach(model, Adapter(**{"rank": 4, "targets": "all-linear"} | adapter))
    for key, wrapper in zip(mx.random.split(mx.random.key(1), len(wrappers)), wrappers.values(), strict=True):
        wrapper.lora_b = 0.1 * mx.random.normal(wrapper.lora_b.shape, key=key)
    return model


def packed_lines(rows: list[Row] = ROWS) -> list[list[int]]:
    lengths = [len(row) for row in rows]
    lines = pack(sorted(range(len(rows)), key=lengths.__getitem__), lengths)
    assert 1 < len(lines) < len(rows) and max(map(len, lines)) > 2
    return lines


def without_isolation(arrays: Arrays) -> Arrays:
    return {name: array for name, array in arrays.items() if name != "segments"}


def one_segment(arrays: Arrays) -> Arrays:
    return arrays | {"segments": mx.ones_like(arrays["segments"])}


def only(index: int) -> list[Row]:
    """All rows, of which one carries loss."""
    silent = [Row(row.tokens, np.zeros_like(row.weights)) for row in ROWS]
    return [*silent[:index], ROWS[index], *silent[index + 1 :]]


def losses_by_row(model: nn.Module, change: Callable[[Arrays], Arrays] = lambda arrays: arrays) -> list[float]:
    loss, lines = Loss(take_apart(model)), packed_lines()
    return [
        loss(change(as_arrays(collate(only(index), lines, packed=True)))).item()  # type: ignore[misc]
        for index in range(len(ROWS))
    ]


def gradients(model: nn.Module, arrays: Arrays) -> dict[str, mx.array]:
    return dict(tree_flatten(nn.value_and_grad(model, Loss(take_apart(model)).differentiable)(arrays)[1]))


def distance(one: dict[str, mx.array], other: dict[str, mx.array]) -> float:
    """The largest difference of any array, relative to its norm."""
    assert one.keys() == other.keys()
    return max((mx.linalg.norm(one[name] - other[name]) / mx.linalg.norm(one[name])).item() for name in one)


def run(model: nn.Module, *, packing: bool, seed: int = 0, **settings: Any) -> list[Any]:
    """Train; by default every step has all rows, so that steps can be compared whatever the order of rows."""
    chosen = fixed(**{"batch_size": len(ROWS), "warmup": 0.0, "iters": 3, "learning_rate": 1e-2} | settings)
    rows, valid = ROWS, make_rows(5, seed=1)
    return list(train(model, rows, valid, chosen, seed=seed, trunk=take_apart(model), packing=packing))


@pytest.mark.parametrize("name", MODELS)
def test_every_row_has_the_loss_that_it_has_alone(name: str) -> None:
    model = adapted(name)
    loss = Loss(take_apart(model))
    alone = [loss(as_arrays(collate([row]))).item() for row in ROWS]
    np.testing.assert_allclose(losses_by_row(model), alone, rtol=1e-4)
    for leak in (without_isolation, one_segment):
        off = np.abs(np.array(losses_by_row(model, leak)) / alone - 1)
        assert np.count_nonzero(off > 1e-3) > len(ROWS) // 2, "without isolation the comparison has to fail"


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_unpacked_rows(name: str) -> None:
    model = adapted(name)
    alone = gradients(model, as_arrays(collate(ROWS)))
    packed = as_arrays(collate(ROWS, packed_lines(), packed=True))
    assert distance(alone, gradients(model, packed)) < 1e-4
    for leak in (without_isolation, one_segment):
        assert distance(alone, gradients(model, leak(packed))) > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_run_has_the_losses_and_the_adapter_of_an_unpacked_one(name: str) -> None:
    """The trial length, the compiled step and the evaluation included; SGD, whose steps follow the gradients."""
    plain, packed = (run(adapted(name), packing=packing, **SGD) for packing in (False, True))
    for one, other in zip(of(plain, Step), of(packed, Step), strict=True):
        assert (one.loss, one.tokens) == (pytest.approx(other.loss, rel=1e-4), other.tokens)
        assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-3)
    assert of(plain, Evaluated)[0].loss == pytest.approx(of(packed, Evaluated)[0].loss, rel=1e-6)
    assert of(plain, Evaluated)[-1].loss == pytest.approx(of(packed, Evaluated)[-1].loss, rel=1e-4)
    assert distance(arrays_of(plain), arrays_of(packed)) < 1e-4
    start = dict(tree_flatten(adapted(name).trainable_parameters()))
    assert distance(start, arrays_of(plain)) > 1e-2, "the steps have to be large enough to tell"


def test_one_packed_sgd_step_is_the_unpacked_one() -> None:
    plain, packed = (run(adapted("llama"), packing=packing, iters=1, **SGD) for packing in (False, True))
    start = dict(tree_flatten(adapted("llama").trainable_parameters()))
    moved = [{name: array - start[name] for name, array in arrays_of(events).items()} for events in (plain, packed)]
    assert distance(*moved) < 1e-3


def test_packing_computes_fewer_positions_and_trains_every_token() -> None:
    settings = {"iters": None, "epochs": 1, "batch_size": 6}
    plain, packed = (of(run(adapted("llama"), packing=packing, **settings), Finished)[0] for packing in (False, True))
    assert packed.trained_tokens == plain.trained_tokens == sum(row.trained for row in ROWS)
    assert packed.iters == plain.iters == 2
    real = sum(len(row) - 1 for row in ROWS)
    assert packed.computed_tokens * (1 - packed.padding_fraction) == pytest.approx(real)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_packed_rows_are_recomputed_with_their_masks(name: str) -> None:
    off, on = (run(adapted(name), packing=True, grad_checkpoint=choice, **SGD) for choice in ("off", "on"))
    np.testing.assert_allclose([e.loss for e in of(on, Step)], [e.loss for e in of(off, Step)], rtol=1e-5)
    assert distance(arrays_of(off), arrays_of(on)) < 1e-4


def test_the_same_seed_gives_the_same_bytes_packed_with_dropout_and_checkpointing() -> None:
    settings = {"batch_size": 6, "iters": 3, "grad_checkpoint": "on"}
    one, same, other = (
        arrays_of(run(adapted("llama", dropout=0.2), packing=True, seed=seed, **settings)) for seed in (1, 1, 2)
    )
    assert all(mx.array_equal(one[name], same[name]) for name in one)
    assert not all(mx.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("kind", "sizes", "reason"),
    [
        (
            "mamba",
            {"hidden_size": 32, "intermediate_size": 64, "state_size": 4, "num_hidden_layers": 2, "conv_kernel": 4,
             "vocab_size": 64, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4},
            "state that runs across rows",
        ),
        (
            "gpt2",
            {"n_ctx": 128, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128, "layer_norm_epsilon": 1e-5,
             "vocab_size": 64},
            "states of the rows alone",
        ),
    ],
)  # fmt: skip
def test_a_model_whose_rows_would_see_each_other_is_refused(kind: str, sizes: dict[str, Any], reason: str) -> None:
    module = import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict({"model_type": kind, **sizes}))
    model.load_weights([(path, array + 0.1) for path, array in tree_flatten(model.parameters())])
    model.freeze()
    attach(model, Adapter(rank=2, targets="all-linear"))
    with pytest.raises(TrainingError, match=f"can't be packed for this model: .*{reason}") as refused:
        run(model, packing=True)
    assert refused.value.hint == "set data.packing=false"
