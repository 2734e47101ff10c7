"""The last layer for some columns alone: the trunk's own states and gradients there, the rest of it not computed."""

from __future__ import annotations

import io

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter
from mlx_lora.data.batch import Batch, collate
from mlx_lora.data.rows import Row
from mlx_lora.models.trunk.last_layer import rows_of_mask
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.lean import lean
from mlx_lora.models.trunk.trunk import Trunk
from mlx_lora.models.trunk.verify import take_apart, verify, verify_start
from mlx_lora.train.objectives.likelihood import Loss, as_arrays
from tests.adapters import zoo

SERVED = [name for name in zoo.MODELS if name != "gemma2 soft caps"]
COLUMNS = mx.array([[7, 8, 9, 10], [2, 3, 4, 5]])
TOKENS = mx.array(np.random.default_rng(1).integers(1, zoo.VOCABULARY, (2, 12)))


def trunk_of(model: nn.Module) -> Trunk:
    trunk = take_apart(model)
    assert verify(trunk, recompute=False, columns=True).columns
    return trunk


def adapted(name: str, *, dropout: float = 0.0, layers: int = 2) -> nn.Module:
    """A model with adapters that do something in its last layers."""
    model = zoo.network(name)
    for wrapper in attach(model, Adapter(rank=2, targets="all-linear", layers=layers, dropout=dropout)).values():
        wrapper.lora_b = 0.1 * mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(1))
    return model


def batch(lines: list[list[int]] | None = None) -> Batch:
    """Rows of 40 tokens, of which the last few carry loss, but for one whose loss is in the middle; packed or not."""
    draw = np.random.default_rng(0)
    rows = []
    for start, end in ((33, 40), (29, 39), (10, 14), (38, 40)):
        weights = np.zeros(40, np.float32)
        weights[start:end] = 1.0
        rows.append(Row(draw.integers(1, zoo.VOCABULARY, 40).astype(np.int32), weights))
    return collate(rows, lines, packed=lines is not None)


def value_and_gradients(model: nn.Module, loss: Loss, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    value, gradients = nn.value_and_grad(model, loss.differentiable)(arrays)
    return {"loss": value, **dict(tree_flatten(gradients))}


def assert_same(one: dict[str, mx.array], other: dict[str, mx.array]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        away = mx.linalg.norm(one[name] - other[name]) / mx.linalg.norm(one[name])
        assert away.item() < 1e-5, name


@pytest.mark.parametrize("name", SERVED)
def test_states_are_those_of_the_trunk(name: str) -> None:
    """Twelve positions: the window of Gemma 3's sliding layers is four, so its mask is an array."""
    model = adapted(name)
    trunk = trunk_of(model)
    whole = mx.take_along_axis(trunk.run(TOKENS), COLUMNS[..., None], axis=1)
    np.testing.assert_allclose(trunk.run(TOKENS, columns=COLUMNS), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SERVED)
def test_loss_and_gradients_are_those_of_all_positions(name: str) -> None:
    model, rows = adapted(name), batch()
    trunk, columns = trunk_of(model), rows.columns()
    assert columns is not None and columns.shape == (4, 10), "a span of ten"
    expected = value_and_gradients(model, Loss(trunk), as_arrays(rows))
    with lean(layers_of(model)):  # as in training
        ours = Loss(trunk)
        assert_same(expected, value_and_gradients(model, ours, as_arrays(rows, None, columns)))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_loss_and_gradients_of_packed_rows(name: str) -> None:
    model, rows = adapted(name), batch([[2, 0], [1], [3]])
    trunk = trunk_of(model)
    columns = np.array([[*range(8, 78)], [*range(8, 78)], [*range(8, 78)]], np.int32)
    expected = value_and_gradients(model, Loss(trunk), as_arrays(rows))
    assert_same(expected, value_and_gradients(model, Loss(trunk), as_arrays(rows, None, columns)))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_loss_and_gradients_above_kept_states(name: str) -> None:
    model, rows = adapted(name, layers=1), batch()
    trunk = trunk_of(model)
    assert isinstance(verify_start(trunk, 1), mx.array)
    states, columns = trunk.entering(mx.array(rows.inputs), 1), rows.columns()
    expected = value_and_gradients(model, Loss(trunk), as_arrays(rows))
    kept = Loss(trunk, start=1)
    assert_same(expected, value_and_gradients(model, kept, as_arrays(rows, states, columns)))


def test_every_product_is_computed_once() -> None:
    """The layer's code runs twice, but keys and values are all that is evaluated of the first time."""

    def products(*outputs: mx.array) -> int:
        drawn = io.StringIO()
        mx.export_to_dot(drawn, *outputs)
        return drawn.getvalue().count("Matmul") + drawn.getvalue().count("AddMM")

    model = adapted("llama")
    trunk = trunk_of(model)
    assert products(trunk.run(TOKENS, columns=COLUMNS)) == products(trunk.run(TOKENS)) > 10


def test_what_cant_be_run_like_this_is_left_alone() -> None:
    gemma2 = take_apart(zoo.network("gemma2 soft caps"))  # makes scores of a shape of its own
    (note,) = verify(gemma2, recompute=False, columns=True).notes
    assert note.startswith("the last layer isn't cut for gemma2: ")

    class Looking(type(layers_of(zoo.network("llama"))[0])):  # type: ignore[misc]
        """A layer whose outputs depend on the neighbouring position in another way than by attention."""

        def __call__(self, x: mx.array, mask: mx.array | None = None, cache: object = None) -> mx.array:
            return super().__call__(x, mask, cache) + mx.roll(x, 1, axis=1)

    class Twice(type(zoo.network("llama").model)):  # type: ignore[misc]
        """A trunk that runs its layers two times."""

        def __call__(
            self, inputs: mx.array, cache: object = None, input_embeddings: mx.array | None = None
        ) -> mx.array:
            once = super().__call__(inputs, cache, input_embeddings)
            return super().__call__(inputs, cache, once)

    for change in (Looking, Twice):
        model = zoo.network("llama")
        (layers_of(model)[-1] if change is Looking else model.model).__class__ = change
        trunk = take_apart(model)
        assert trunk.apart and not verify(trunk, recompute=False, columns=True).columns


@pytest.mark.parametrize("grouped", [False, True])
def test_rows_of_masks(grouped: bool) -> None:
    columns, whole = mx.array([[1, 2], [3, 4]]), mx.tril(mx.ones((6, 6), mx.bool_))
    expected = np.array([[whole[1], whole[2]], [whole[3], whole[4]]])
    shape = (2, 1, 1, 6, 6) if grouped else (2, 1, 6, 6)
    for mask in ("causal", whole, mx.broadcast_to(whole, shape)):
        found = rows_of_mask(mask, columns, 6)
        assert found is not None and found.shape[-2:] == (2, 6)
        np.testing.assert_array_equal(np.array(found).reshape(expected.shape), expected)
    assert rows_of_mask(None, columns, 6) is None


def test_columns_hold_every_position_with_loss_or_there_are_none() -> None:
    rows = batch()
    columns = rows.columns()
    assert columns is not None
    inside = np.take_along_axis(rows.weights, columns, axis=1)
    assert inside.sum() == rows.weights.sum() > 0
    assert (columns >= 0).all() and (columns < rows.inputs.shape[1]).all() and (np.diff(columns, axis=1) == 1).all()
    positions, targets, weights = rows.with_loss(columns)
    np.testing.assert_array_equal(targets[weights > 0], rows.targets[rows.weights > 0])
    assert (inside.reshape(-1)[positions] >= weights).all()
    rows.weights[2, 0] = 1.0  # now one line needs nearly all of them
    rows.weights[2, 38] = 1.0
    assert rows.columns() is None
