"""Work that is counted and not timed: what is differentiated, kept in memory, padded, and sent through the head."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter
from mlx_lora.data.batch import collate
from mlx_lora.data.rows import Row
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.verify import Verified, take_apart
from mlx_lora.train import session, step
from mlx_lora.train.distributed import Processes
from mlx_lora.train.events import Finished
from mlx_lora.train.objectives import likelihood
from mlx_lora.train.objectives.likelihood import Loss, as_arrays
from mlx_lora.train.trainer import train
from tests.adapters import zoo
from tests.fixed import fixed
from tests.train.test_trainer import make_rows, of


def network(monkeypatch: pytest.MonkeyPatch, layers: int, adapted: int = 2) -> nn.Module:
    """A Llama with adapters in its last layers."""
    monkeypatch.setitem(zoo.COMMON, "num_hidden_layers", layers)
    model = zoo.network("llama")
    attach(model, Adapter(rank=2, targets="all-linear", layers=adapted))
    return model


def run(model: nn.Module, rows: list[Row], **settings: Any) -> Finished:
    chosen = fixed(**{"batch_size": 8, "warmup": 0.0, "cache_prefix": "off"} | settings)
    return of(list(train(model, rows, [], chosen, trunk=take_apart(model))), Finished)[0]  # type: ignore[no-any-return]


def like_wikisql(count: int) -> list[Row]:
    """A table's header and a question, 60 to 250 tokens, and a query of 15 to 45 that carries the loss."""
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        question, query = int(np.clip(draw.lognormal(4.7, 0.3), 60, 250)), int(draw.integers(15, 46))
        tokens = draw.integers(1, zoo.VOCABULARY, question + query).astype(np.int32)
        rows.append(Row(tokens, np.array([0.0] * question + [1.0] * query, np.float32)))
    return rows


def count_gradients(layers: list[nn.Module]) -> Counter[int]:
    """How often a gradient of each layer's output is asked for, once a layer is traced."""
    asked: Counter[int] = Counter()

    def watched(original: type[nn.Module], number: int) -> type[nn.Module]:
        @mx.custom_function
        def same(x: mx.array) -> mx.array:
            return x * 1

        @same.vjp
        def same_vjp(_: Any, cotangent: mx.array, __: Any) -> mx.array:
            asked[number] += 1
            return cotangent

        def call(self: nn.Module, *arguments: Any, **named: Any) -> mx.array:
            return same(original.__call__(self, *arguments, **named))

        return type(original.__name__, (original,), {"__call__": call})

    for number, layer in enumerate(layers):
        layer.__class__ = watched(type(layer), number)
    return asked


@pytest.mark.parametrize("checkpoint", ["off", "on"])
def test_no_gradient_is_computed_below_the_lowest_adapted_layer(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(monkeypatch, 4)
    asked = count_gradients(layers_of(model))
    run(model, make_rows(8), grad_checkpoint=checkpoint)
    assert (asked[0], asked[1]) == (0, 0)
    assert asked[2] > 0 and asked[3] > 0


@pytest.mark.real
def test_frozen_layers_below_cost_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak of a step, less the weights, is that of the adapted layers however many there are below.

    But for what MLX's CPU backend prepares ahead of itself: some ten results, fewer than twenty layers would keep.
    """
    rows = [Row(np.arange(1, 130, dtype=np.int32) % 90, np.array([0.0] * 109 + [1.0] * 20, np.float32))] * 8
    peaks = {}
    for layers, adapted in ((4, 2), (24, 2), (12, 10)):
        model = network(monkeypatch, layers, adapted)
        taken = []
        for _ in range(3):  # MLX's CPU backend runs ahead of itself, further on a busy machine
            gc.collect()  # what other tests have left must not be freed on the way
            mx.synchronize()
            before = mx.get_active_memory()
            taken.append(run(model, rows, iters=1).peak_memory_bytes - before)
        peaks[layers, adapted] = min(taken[1:])  # during the first, what other tests have left may still be freed
        del model
    ahead = 10 * 8 * 128 * 4 * zoo.COMMON["hidden_size"]
    assert peaks[24, 2] < 1.05 * peaks[4, 2] + ahead, peaks
    assert peaks[12, 10] > 2 * peaks[4, 2], f"the activations have to matter: {peaks}"


def test_little_more_than_the_trained_tokens_enters_the_head_and_little_is_padded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entered: list[int] = []
    original: Callable[..., Any] = likelihood._tile

    def counted(head: Any, hidden: mx.array, *others: Any) -> Any:
        entered.append(hidden.shape[0])
        return original(head, hidden, *others)

    monkeypatch.setattr(likelihood, "_tile", counted)
    monkeypatch.setattr(mx, "compile", lambda function, **_: function)
    rows = like_wikisql(200)
    finished = run(network(monkeypatch, 1, 1), rows, epochs=1)
    trained = sum(row.trained for row in rows)
    assert finished.trained_tokens == trained
    assert trained <= sum(entered) <= 1.05 * trained
    assert finished.padding_fraction <= 0.05


@pytest.mark.parametrize("checkpoint", ["off", "on"])
def test_the_last_layer_runs_for_positions_with_loss(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On rows like WikiSQL's for less than half of them, to the same losses; where layers are recomputed for all."""
    made: list[tuple[int, int]] = []
    original = session.as_arrays

    def noted(batch: Any, states: Any = None, columns: Any = None) -> Any:
        made.append((batch.inputs.size, batch.inputs.size if columns is None else columns.size))
        return original(batch, states, columns)

    monkeypatch.setattr(session, "as_arrays", noted)
    rows = like_wikisql(48)
    ours = run(network(monkeypatch, 2), rows, epochs=1, grad_checkpoint=checkpoint)
    positions, computed = (sum(sizes) for sizes in zip(*made, strict=True))
    assert computed == positions if checkpoint == "on" else computed < 0.5 * positions
    monkeypatch.setattr(session, "verify", lambda *_, **__: Verified(columns=False))
    assert run(network(monkeypatch, 2), rows, epochs=1).train_loss == pytest.approx(ours.train_loss, rel=1e-5)


def test_frozen_parameters_have_neither_gradients_nor_optimizer_state(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(monkeypatch, 4)
    trained = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert trained and all(name.endswith(("lora_a", "lora_b")) for name in trained)
    seen: list[set[str]] = []
    original = step.optim.global_norm

    def noted(gradients: Any) -> mx.array:
        seen.append({name for name, _ in tree_flatten(gradients)})
        return original(gradients)

    monkeypatch.setattr(step.optim, "global_norm", noted)
    chosen = fixed(optimizer="adamw")
    stepper = step.Stepper(model, Loss(take_apart(model)), chosen, 1, 0, Processes())
    arrays = as_arrays(collate(make_rows(4)))
    before = addresses(model)
    mx.eval(stepper.dispatch([arrays], 4).loss)
    assert seen == [trained] and set(stepper.adapter()) == trained
    state = {name for name, _ in tree_flatten(stepper._optimizer.state)} - {"step", "learning_rate"}
    assert state == {f"{name}.{moment}" for name in trained for moment in "mv"}
    moved = {name for name, address in addresses(model).items() if before[name] != address}
    assert moved <= trained, "frozen arrays aren't even copied"


def addresses(model: nn.Module) -> dict[str, int]:
    """Where each parameter lies in memory."""
    return {name: np.asarray(array).ctypes.data for name, array in tree_flatten(model.parameters())}
