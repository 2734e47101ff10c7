"""Batches: every row in every epoch, an order that depends on seed and epoch alone, and padding that counts nowhere."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_lora.data.batch import EVALUATED_POSITIONS, by_length, collate, epoch_steps, padded, steps_per_epoch
from mlx_lora.data.encode import Row


def make_rows(lengths: list[int], *, seed: int = 0) -> list[Row]:
    """Rows whose tokens include 0, some of it with loss, as a real vocabulary's first token may have."""
    draw = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        weights = (draw.random(length) < 0.5).astype(np.float32)
        weights[0], weights[-1] = 0, 1
        rows.append(Row(draw.integers(0, 4, length).astype(np.int32), weights))
    return rows


def lengths_like_a_chat(count: int, *, seed: int = 0) -> list[int]:
    return np.clip(np.random.default_rng(seed).lognormal(5, 0.7, count), 4, 2000).astype(int).tolist()


def steps(lengths: list[int], *, batch: int = 4, accumulation: int = 1, seed: int = 0, epoch: int = 0) -> list:
    made = epoch_steps(lengths, batch_size=batch, grad_accumulation=accumulation, seed=seed, epoch=epoch)
    return [[micro.tolist() for micro in step] for step in made]


SHAPES = [(1, 4, 1), (3, 4, 1), (8, 4, 1), (9, 4, 1), (9, 4, 2), (37, 3, 5), (1000, 4, 1), (1001, 8, 4)]


@pytest.mark.parametrize(("count", "batch", "accumulation"), SHAPES)
def test_the_last_partial_batch_is_kept_and_every_row_comes_once(count: int, batch: int, accumulation: int) -> None:
    made = steps(lengths_like_a_chat(count), batch=batch, accumulation=accumulation)
    assert sorted(row for step in made for micro in step for row in micro) == list(range(count))
    assert len(made) == steps_per_epoch(count, batch_size=batch, grad_accumulation=accumulation)
    sizes = sorted(sum(map(len, step)) for step in made)
    assert all(size == batch * accumulation for size in sizes[1:]), "at most one step is smaller"
    assert all(0 < len(micro) <= batch for step in made for micro in step)


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    lengths = lengths_like_a_chat(100)
    first = steps(lengths, seed=3, epoch=1)
    np.random.seed(5)
    list(by_length(make_rows(lengths), 4))
    assert steps(lengths, seed=3, epoch=1) == first
    assert steps(lengths, seed=3, epoch=2) != first
    assert steps(lengths, seed=4, epoch=1) != first


def padding(rows: list[Row], made: list) -> float:
    batches = [collate([rows[index] for index in micro]) for step in made for micro in step]
    return 1 - sum(batch.real for batch in batches) / sum(batch.inputs.size for batch in batches)


@pytest.mark.parametrize(("count", "most"), [(64, 0.12), (2000, 0.05)])
def test_grouping_by_length_leaves_little_padding(count: int, most: float) -> None:
    rows = make_rows(lengths_like_a_chat(count))
    unsorted = [[list(range(start, min(start + 4, count)))] for start in range(0, count, 4)]
    grouped = padding(rows, steps([len(row) for row in rows]))
    assert grouped < most
    assert padding(rows, unsorted) > 0.3, "the lengths have to differ for this to mean something"


def test_the_smaller_step_is_not_always_the_longest_rows() -> None:
    lengths = list(range(10, 43))  # 33 rows, four a step
    smaller = [next(step[0] for step in steps(lengths, epoch=epoch) if len(step[0]) == 1) for epoch in range(20)]
    assert len({row for (row,) in smaller}) > 3


def test_batches_of_one_epoch_do_not_come_shortest_first() -> None:
    lengths = list(range(8, 408))
    firsts = [lengths[step[0][0]] for step in steps(lengths)]
    assert firsts != sorted(firsts) and firsts != sorted(firsts, reverse=True)


@pytest.mark.parametrize("lengths", [[2], [9], [10], [3, 9, 17], [5, 5, 5], [2, 200]])
def test_collate_shifts_and_pads_without_weight(lengths: list[int]) -> None:
    rows = make_rows(lengths)
    batch = collate(rows)
    width = batch.inputs.shape[1]
    assert width == padded(max(lengths) - 1, 8)
    for index, row in enumerate(rows):
        length = len(row) - 1
        np.testing.assert_array_equal(batch.inputs[index, :length], row.tokens[:-1])
        np.testing.assert_array_equal(batch.targets[index, :length], row.tokens[1:])
        np.testing.assert_array_equal(batch.weights[index, :length], row.weights[1:])
        assert not batch.weights[index, length:].any(), "a padding token must not be trained"
    assert batch.real == sum(lengths) - len(lengths)
    assert batch.trained == sum(row.trained for row in rows), "a padding token must not be counted"
    assert (batch.inputs.dtype, batch.targets.dtype, batch.weights.dtype) == (np.int32, np.int32, np.float32)


@pytest.mark.parametrize("lengths", [[2], [40, 3, 17, 90], [33] * 8, [500, 2]])
def test_positions_with_loss_give_the_same_sums_as_all_positions(lengths: list[int]) -> None:
    batch = collate(make_rows(lengths, seed=len(lengths)))
    losses = np.random.default_rng(0).random(batch.targets.size * 4).reshape(-1, 4)  # by position and token
    flat = batch.targets.reshape(-1)
    expected = (losses[np.arange(flat.size), flat] * batch.weights.reshape(-1)).sum()
    positions, targets, weights = batch.with_loss()
    assert (losses[positions, targets] * weights).sum() == pytest.approx(expected, rel=1e-12)
    assert weights.sum() == batch.weights.sum()
    assert len(positions) == padded(batch.trained, 16)
    assert len(positions) == len(targets) == len(weights)


@pytest.mark.parametrize(("count", "batch"), [(1, 8), (8, 8), (19, 8)])
def test_evaluation_batches_are_fixed_and_hold_every_row(count: int, batch: int) -> None:
    rows = make_rows(lengths_like_a_chat(count))
    first = list(by_length(rows, batch))
    steps([len(row) for row in rows], seed=9)
    np.random.seed(1)
    for one, other in zip(first, by_length(rows, batch), strict=True):
        np.testing.assert_array_equal(one.inputs, other.inputs)
    assert sum(len(one.inputs) for one in first) == count
    assert sum(one.trained for one in first) == sum(row.trained for row in rows)


def test_planned_sizes_are_few_and_close() -> None:
    """Every size has a compiled graph of its own: a thousand lengths must not become a thousand graphs."""
    for least in (8, 16):
        sizes = {size: padded(size, least) for size in range(1, 4097)}
        assert all(size <= plan < size + max(least, size / 16 + 1) for size, plan in sizes.items())
        assert len(set(sizes.values())) <= 100


def test_long_rows_are_evaluated_a_few_at_a_time() -> None:
    rows = make_rows([50] * 8 + [1500, 1900, 3000])
    assert [len(batch.inputs) for batch in by_length(rows, 8)] == [8, 1, 1, 1]
    assert all(batch.inputs.size <= EVALUATED_POSITIONS for batch in by_length(rows[:10], 8))
