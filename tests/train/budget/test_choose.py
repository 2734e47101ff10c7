"""Which way to run fits a limit: smaller micro-batches, then layers computed again, then single rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlx_lora.data.batch import MOST_POSITIONS, epoch_steps, padded
from mlx_lora.errors import TrainingError
from mlx_lora.train.budget.choose import GOOD_POSITIONS, Experience, Lengths, Plan, Way, largest, plan, states_bytes
from mlx_lora.train.budget.predict import Micro, predict
from tests.fixed import fixed
from tests.train.budget.test_costs import cost

COSTS = cost(targets="all-linear")
ROWS = Lengths([257] * 32, 256)


def chosen(limit: int, rows: Lengths = ROWS, **settings: Any) -> Plan:
    packing = settings.pop("packing", False)
    more = {"smaller_than": settings.pop("smaller_than", None)}
    experience = settings.pop("experience", lambda kind: Experience())
    return plan(
        COSTS,
        rows,
        fixed(**{"batch_size": 8, **settings}),
        limit,
        packing=packing,
        experience=experience,
        **more,
    )


def peak(lines: int, *, recompute: bool) -> int:
    return predict(COSTS, Micro(lines, 256, 256 * lines), recompute=recompute).total


@pytest.mark.parametrize(
    ("limit", "lines", "recompute"),
    [
        (1 << 40, 8, False),
        (peak(8, recompute=False), 8, False),
        (peak(8, recompute=False) - 1, 4, False),
        (peak(2, recompute=False), 2, False),
        (peak(2, recompute=True), 2, True),
        (peak(1, recompute=True), 1, True),
    ],
)
def test_the_fastest_way_within_the_limit_is_taken(limit: int, lines: int, recompute: bool) -> None:
    made = chosen(limit)
    assert made.fits and (made.micro.lines, made.recompute) == (lines, recompute)
    assert made.peak_memory_bytes == peak(lines, recompute=recompute)
    assert made.most_positions // 256 == lines


def test_a_row_that_alone_is_over_the_limit_doesnt_fit() -> None:
    made = chosen(peak(1, recompute=True) - 1)
    assert not made.fits and made.micro == Micro(1, 256, 256) and made.recompute


@pytest.mark.parametrize(("grad_checkpoint", "recompute"), [("on", True), ("off", False)])
def test_a_recipe_that_chooses_is_obeyed(grad_checkpoint: str, recompute: bool) -> None:
    for limit in (1 << 40, peak(2, recompute=recompute), 1):
        assert chosen(limit, grad_checkpoint=grad_checkpoint).recompute == recompute


@pytest.mark.parametrize("most", [MOST_POSITIONS, GOOD_POSITIONS])
def test_no_batch_is_larger_than_the_largest(most: int) -> None:
    lengths = np.random.default_rng(0).integers(8, 700, 300).tolist()
    found = largest([padded(length - 1) for length in lengths], 700, 8, most).positions
    assert found <= max(most, padded(max(lengths)))
    for epoch in range(3):
        steps = epoch_steps(lengths, batch_size=8, grad_accumulation=1, seed=0, epoch=epoch, most=most)
        for lines in (lines for step in steps for lines in step):
            assert len(lines) * padded(max(lengths[row] - 1 for (row,) in lines)) <= found


def test_a_long_row_takes_as_many_short_ones_along_as_there_is_room() -> None:
    assert chosen(1 << 40, Lengths([65] * 30 + [1001], 64)).micro == Micro(2, 1024, 128)
    assert chosen(1 << 40, Lengths([65] * 30 + [2001], 64)).micro == Micro(1, 2048, 64)


def test_packed_lines_are_as_wide_as_packing_makes_them() -> None:
    made = chosen(1 << 40, packing=True)
    assert (made.micro.width, made.micro.lines) == (512, 4)
    assert chosen(1 << 40, Lengths([33] * 4, 32), packing=True, batch_size=2).micro.width == 64


def test_what_runs_have_shown_of_a_kind_corrects_it() -> None:
    half = chosen(1 << 40, experience=lambda kind: Experience(0.5, 1e-9 if "kept" in kind else None))
    assert half.correction == 0.5 and half.pace == 1e-9
    assert half.peak_memory_bytes - half.fixed == pytest.approx((peak(8, recompute=False) - half.fixed) / 2, abs=8)
    assert half.kind == "cpu, 32 bits, layers kept"


def test_after_a_memory_stop_the_next_smaller_plan_is_taken_until_there_is_none() -> None:
    """Stopped again and again, each run is smaller than the one before, and the smallest is refused in plain words."""
    made, ways = chosen(1 << 40), []
    while len(ways) < 99:
        ways.append(made.way)
        try:
            made = chosen(1 << 40, smaller_than=made.way)
        except TrainingError as error:
            assert "the smallest way to run this has been stopped" in error.message
            break
    assert ways == list(dict.fromkeys(ways)) and ways[0] == Way(False, MOST_POSITIONS)
    assert ways[-1] == Way(True, 256), "one row at a time, layers computed again"
    assert chosen(1 << 40, smaller_than=Way(True, 3)).way == ways[0], "a way that these rows don't have"


LAST = cost(layers=2)


def test_kept_states_are_counted_and_yield_first() -> None:
    """They get what the step leaves of the limit: a byte less, and they go to a file, with the same micro-batches."""
    train = fixed(batch_size=8, epochs=2)
    without = plan(LAST, ROWS, train.model_copy(update={"cache_prefix": "off"}), 1 << 40)
    states = 4 * LAST.hidden * 32 * 256
    assert states_bytes(LAST, ROWS, train) == states
    room = without.peak_memory_bytes + states
    for limit, inside in ((room, states), (room - 1, 0)):
        made = plan(LAST, ROWS, train, limit)
        assert made.states_bytes == inside and made.way == without.way
        assert made.peak_memory_bytes == without.peak_memory_bytes + inside
        assert made.parts.overhead == without.parts.overhead + inside and made.fixed == without.fixed + inside
    assert states_bytes(LAST, Lengths([257] * 32, 256, [257]), train) == states + 4 * LAST.hidden * 256


def test_states_are_kept_only_where_rows_come_again_and_layers_lie_below() -> None:
    assert states_bytes(LAST, ROWS, fixed(batch_size=8, epochs=1)) == 0
    assert states_bytes(LAST, ROWS, fixed(batch_size=8, iters=5)) > 0 == states_bytes(LAST, ROWS, fixed(iters=4))
    assert states_bytes(COSTS, ROWS, fixed(epochs=3)) == 0


def test_the_json_keys() -> None:
    facts = chosen(1).as_dict()
    assert facts.keys() >= {"fits", "peak_memory_bytes", "parts", "limit_bytes", "suggestion", "seconds"}
    assert facts["parts"].keys() == {"weights", "adapter", "optimizer", "activations", "loss", "overhead"}
    assert sum(facts["parts"].values()) == facts["peak_memory_bytes"]
