"""Batches: every row in every epoch, an order that depends on seed and epoch alone, and padding that counts nowhere."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_lora.data import batch as batches
from mlx_lora.data.batch import (
    MOST_POSITIONS,
    PACKED_POSITIONS,
    Batch,
    Lines,
    by_length,
    collate,
    epoch_steps,
    padded,
    steps_per_epoch,
)
from mlx_lora.data.rows import Row

Steps = list[list[Lines]]


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


def steps(
    lengths: list[int],
    *,
    batch: int = 4,
    accumulation: int = 1,
    seed: int = 0,
    epoch: int = 0,
    packing: bool = False,
    share: tuple[int, int] = (0, 1),
) -> Steps:
    return epoch_steps(
        lengths,
        batch_size=batch,
        grad_accumulation=accumulation,
        seed=seed,
        epoch=epoch,
        packing=packing,
        share=share,
    )


def rows_in(step: list[Lines]) -> list[int]:
    return [row for micro in step for line in micro for row in line]


def positions(line: list[int], lengths: list[int]) -> int:
    return sum(lengths[row] - 1 for row in line)


def laid_out(rows: list[Row], made: Steps, *, packed: bool = False) -> list[Batch]:
    return [collate(rows, lines, packed=packed) for step in made for lines in step]


SHAPES = [(1, 4, 1), (3, 4, 1), (8, 4, 1), (9, 4, 1), (9, 4, 2), (37, 3, 5), (1000, 4, 1), (1001, 8, 4)]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("count", "batch", "accumulation"), SHAPES)
def test_the_last_partial_batch_is_kept_and_every_row_comes_once(
    count: int, batch: int, accumulation: int, packing: bool
) -> None:
    made = steps(lengths_like_a_chat(count), batch=batch, accumulation=accumulation, packing=packing)
    assert sorted(row for step in made for row in rows_in(step)) == list(range(count))
    assert len(made) == steps_per_epoch(count, batch_size=batch, grad_accumulation=accumulation)
    sizes = sorted(len(rows_in(step)) for step in made)
    assert all(size == batch * accumulation for size in sizes[1:]), "at most one step is smaller"
    assert 0 < sizes[0] <= batch * accumulation
    for micro in (micro for step in made for micro in step):
        assert micro and all(micro), "a micro-batch or a line without rows"
        assert sum(map(len, micro)) <= batch or len(micro) == 1
        assert packing or all(len(line) == 1 for line in micro)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_a_budget_cuts_a_step_and_never_changes_its_rows(packing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [*lengths_like_a_chat(301), 2500, 5000]
    seen, cuts = [], []
    for budget in (1, 100, 300, MOST_POSITIONS, 1 << 30):
        monkeypatch.setattr(batches, "MOST_POSITIONS", budget)
        made = steps(lengths, batch=6, accumulation=2, packing=packing)
        seen.append([sorted(rows_in(step)) for step in made])
        cuts.append(sum(map(len, made)))
        for micro in (micro for step in made for micro in step):
            size = len(micro) * padded(max(positions(line, lengths) for line in micro))
            assert size <= budget or len(micro) == 1
    assert all(one == seen[0] for one in seen)
    assert cuts == sorted(cuts, reverse=True) and cuts[0] > cuts[-1]


def test_micro_batches_are_full_before_another_one_is_begun() -> None:
    """Cutting more often than rows and positions ask for would only cost time."""
    lengths = lengths_like_a_chat(500)
    for step in steps(lengths, batch=4, accumulation=8):
        for one, following in zip(step, step[1:], strict=False):
            width = padded(positions(following[0], lengths))
            assert len(one) == 4 or (len(one) + 1) * width > MOST_POSITIONS


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_the_shares_of_all_processes_together_are_each_step(processes: int, packing: bool) -> None:
    """Also where the last step has fewer rows than there are processes."""
    lengths = lengths_like_a_chat(101)
    whole = steps(lengths, batch=5, packing=packing, seed=2)
    shares = [steps(lengths, batch=5, packing=packing, seed=2, share=(rank, processes)) for rank in range(processes)]
    assert all(len(share) == len(whole) for share in shares), "every process takes part in every step"
    for number, step in enumerate(whole):
        parts = [rows_in(share[number]) for share in shares]
        assert sorted(row for part in parts for row in part) == sorted(rows_in(step))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1, "one process would wait for the others"


@pytest.mark.parametrize("processes", [1, 2, 3, 20])
def test_the_shares_of_an_evaluation_together_are_every_row(processes: int) -> None:
    rows = make_rows(lengths_like_a_chat(50))
    shared = [batch for rank in range(processes) for batch in by_length(rows, 4, (rank, processes))]
    whole = list(by_length(rows, 4))
    assert sorted(map(str, (batch.lines for batch in shared))) == sorted(map(str, (batch.lines for batch in whole)))
    assert sum(batch.trained for batch in shared) == sum(row.trained for row in rows)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_the_order_is_a_function_of_seed_and_epoch_alone(packing: bool) -> None:
    lengths = lengths_like_a_chat(100)
    first = steps(lengths, seed=3, epoch=1, packing=packing)
    np.random.seed(5)
    list(by_length(make_rows(lengths), 4))
    assert steps(lengths, seed=3, epoch=1, packing=packing) == first
    assert steps(lengths, seed=3, epoch=2, packing=packing) != first
    assert steps(lengths, seed=4, epoch=1, packing=packing) != first


def padding(rows: list[Row], made: Steps, *, packed: bool = False) -> float:
    """The fraction of positions that are padding."""
    batches = laid_out(rows, made, packed=packed)
    return 1 - sum(batch.real for batch in batches) / sum(batch.inputs.size for batch in batches)


@pytest.mark.parametrize(("count", "most"), [(64, 0.12), (2000, 0.05)])
def test_grouping_by_length_leaves_little_padding(count: int, most: float) -> None:
    rows = make_rows(lengths_like_a_chat(count))
    unsorted = [[[[row] for row in range(start, min(start + 4, count))]] for start in range(0, count, 4)]
    grouped = padding(rows, steps([len(row) for row in rows]))
    assert grouped < most
    assert padding(rows, unsorted) > 0.3, "the lengths have to differ for this to mean something"


def test_the_smaller_step_is_not_always_the_longest_rows() -> None:
    lengths = list(range(10, 43))  # 33 rows, four a step
    smaller = [
        next(step for step in map(rows_in, steps(lengths, epoch=epoch)) if len(step) == 1) for epoch in range(20)
    ]
    assert len({row for (row,) in smaller}) > 3


def test_batches_of_one_epoch_do_not_come_shortest_first() -> None:
    lengths = list(range(8, 408))
    firsts = [lengths[rows_in(step)[0]] for step in steps(lengths)]
    assert firsts != sorted(firsts) and firsts != sorted(firsts, reverse=True)


@pytest.mark.parametrize("lengths", [[2], [9], [10], [3, 9, 17], [5, 5, 5], [2, 200]])
def test_collate_shifts_and_pads_without_weight(lengths: list[int]) -> None:
    rows = make_rows(lengths)
    batch = collate(rows)
    width = batch.inputs.shape[1]
    assert width == padded(max(lengths) - 1)
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
    assert len(positions) == padded(batch.trained)
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
    sizes = {size: padded(size) for size in range(1, 4097)}
    assert all(size <= plan < size + max(8, size / 16 + 1) for size, plan in sizes.items())
    assert all(padded(plan) == plan and plan % 8 == 0 for plan in sizes.values())
    assert len(set(sizes.values())) <= 100


def test_long_rows_are_evaluated_a_few_at_a_time() -> None:
    rows = make_rows([50] * 8 + [1500, 1900, 3000])
    assert [len(batch.inputs) for batch in by_length(rows, 8)] == [8, 1, 1, 1]
    assert all(batch.inputs.size <= MOST_POSITIONS for batch in by_length(rows[:10], 8))


@pytest.mark.parametrize("lengths", [[5, 9, 3], [2] * 40, [600, 4, 513, 512, 90, 7], [3000, 2, 40]], ids=str)
@pytest.mark.parametrize("batch", [2, 100])
def test_packed_rows_keep_their_own_targets_and_segments(lengths: list[int], batch: int) -> None:
    rows = make_rows(lengths)
    longest = max(length - 1 for length in lengths)
    seen = []
    for packed in laid_out(rows, steps(lengths, batch=batch, packing=True), packed=True):
        assert packed.segments is not None and packed.segments.dtype == np.int32
        assert packed.segments.shape == packed.inputs.shape == (len(packed.lines), packed.inputs.shape[1])
        for number, line in enumerate(packed.lines):
            assert positions(line, lengths) <= max(PACKED_POSITIONS, longest)
            start = 0
            for segment, index in enumerate(line, start=1):
                row, here = rows[index], (number, slice(start, start + lengths[index] - 1))
                np.testing.assert_array_equal(packed.inputs[here], row.tokens[:-1])
                np.testing.assert_array_equal(packed.targets[here], row.tokens[1:])
                np.testing.assert_array_equal(packed.weights[here], row.weights[1:])
                assert (packed.segments[here] == segment).all()
                start += lengths[index] - 1
            assert not packed.segments[number, start:].any() and not packed.weights[number, start:].any()
            assert not packed.inputs[number, start:].any() and not packed.targets[number, start:].any()
            seen += line
        assert packed.real == sum(positions(line, lengths) for line in packed.lines)
        assert packed.trained == sum(rows[index].trained for line in packed.lines for index in line)
    assert sorted(seen) == list(range(len(lengths)))


def test_rows_that_are_not_packed_have_no_segments() -> None:
    assert collate(make_rows([5, 9])).segments is None


def test_packing_pads_less_and_mixes_lengths() -> None:
    rows = make_rows(lengths_like_a_chat(400))
    lengths = [len(row) for row in rows]
    grouped, packed = (steps(lengths, batch=8, accumulation=4, packing=packing) for packing in (False, True))
    in_order = [[[[row] for row in range(start, start + 8)]] for start in range(0, 400, 8)]
    assert padding(rows, packed, packed=True) < 0.75 * padding(rows, in_order)
    lines = [line for step in packed for micro in step for line in micro]
    assert len(lines) < 0.6 * len(rows) and max(map(len, lines)) > 1
    apart = [np.mean([np.std([lengths[row] for row in rows_in(step)]) for step in made]) for made in (grouped, packed)]
    assert apart[1] > 2 * apart[0], "packed steps are of one length"


def test_packing_is_close_to_the_fewest_lines() -> None:
    lengths = np.random.default_rng(3).integers(40, 200, 256).tolist()
    (step,) = steps(lengths, batch=256, packing=True)
    lines = sum(map(len, step))
    fewest = -(-sum(length - 1 for length in lengths) // PACKED_POSITIONS)
    assert fewest <= lines <= 1.1 * fewest + 1


def rows_like_short_questions(count: int = 1000, *, seed: int = 0) -> list[Row]:
    """60 to 160 tokens, of which a quarter to a third, the end, carry loss."""
    draw = np.random.default_rng(seed)
    rows = []
    for length in np.clip(draw.normal(100, 20, count), 60, 160).astype(int):
        weights = np.zeros(length, np.float32)
        weights[-round(length * draw.uniform(1 / 4, 1 / 3)) :] = 1
        rows.append(Row(draw.integers(0, 1000, length).astype(np.int32), weights))
    return rows


@pytest.mark.parametrize("batch", [4, 6, 8])
def test_little_is_computed_that_nobody_asked_for_and_shapes_are_few(batch: int) -> None:
    rows = rows_like_short_questions()
    lengths = [len(row) for row in rows]
    shapes: list[tuple[int, ...]] = []
    padded_positions, padded_logits = [], []
    for epoch in range(2):
        made = laid_out(rows, steps(lengths, batch=batch, epoch=epoch))
        logits = [len(one.with_loss()[0]) for one in made]
        padded_positions.append(1 - sum(one.real for one in made) / sum(one.inputs.size for one in made))
        padded_logits.append(1 - sum(one.trained for one in made) / sum(logits))
        shapes += [(*one.inputs.shape, count) for one, count in zip(made, logits, strict=True)]
    print(f"batch {batch}: {padded_positions} positions, {padded_logits} logits, {len(set(shapes))} shapes")
    assert max(padded_positions) <= 0.05
    assert max(padded_logits) <= 0.05
    assert len(set(shapes)) <= 120
