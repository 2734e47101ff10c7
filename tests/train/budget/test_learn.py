"""A run's own peak and pace correct the next plan of its kind, and nothing private is kept for that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_lora.train.budget import learn
from mlx_lora.train.budget.choose import Lengths, Plan, plan
from tests.fixed import fixed
from tests.train.budget.test_costs import cost


def made(bits: int | None = None) -> Plan:
    return plan(cost(bits=bits), Lengths([129] * 4, 128), fixed(), 1 << 40, experience=learn.experience)


def test_without_runs_nothing_is_corrected(home: Path) -> None:
    assert made().correction == 1.0 and made().pace is None
    assert not (home / "plan.json").exists()


def test_the_next_prediction_moves_towards_what_was_measured() -> None:
    first = made()
    measured = first.fixed + int(1.4 * (first.peak_memory_bytes - first.fixed))
    distances = [measured - first.peak_memory_bytes]
    for _ in range(4):
        learn.remember(made(), measured, 1e-6)
        distances.append(measured - made().peak_memory_bytes)
    assert all(0 <= later <= earlier / 1.9 for earlier, later in zip(distances, distances[1:], strict=False))
    assert made(bits=4).correction == 1.0, "another kind of run"


def test_the_pace_is_that_of_a_multiplication() -> None:
    plan = made()
    learn.remember(plan, plan.peak_memory_bytes, 2e-6)
    assert made().pace == pytest.approx(2e-6 / plan.work)
    learn.remember(plan, plan.peak_memory_bytes)
    assert made().pace == pytest.approx(2e-6 / plan.work), "a run that wasn't timed changes no pace"
    learn.remember(plan, plan.peak_memory_bytes, 4e-6)
    assert made().pace == pytest.approx(3e-6 / plan.work)


def test_a_stopped_run_raises_the_correction_at_once_and_never_lowers_it() -> None:
    first = made()
    varying = first.peak_memory_bytes - first.fixed
    learn.remember(first, first.fixed + 3 * varying, stopped=True)
    assert made().correction == pytest.approx(3.0)
    learn.remember(made(), first.fixed + varying, stopped=True)
    assert made().correction == pytest.approx(3.0), "it was stopped before it had shown its peak"
    learn.remember(made(), 1 << 60, stopped=True)
    assert made().correction == learn.MOST_STOPPED


@pytest.mark.parametrize("measured", [0, 1 << 50])
def test_no_run_is_believed_to_be_far_off(measured: int) -> None:
    for _ in range(9):
        learn.remember(made(), measured)
    assert 0.5 <= made().correction <= 2.0


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "null", '{"cpu, 32 bits, layers kept": 3}', '{"cpu, 32 bits, layers kept": {"x": 1}}',
     '{"cpu, 32 bits, layers kept": {"correction": "1"}}', '{"cpu, 32 bits, layers kept": {"correction": 99}}',
     '{"cpu, 32 bits, layers kept": {"correction": 1, "seconds": "x"}}'],
)  # fmt: skip
def test_a_damaged_file_is_as_good_as_none(home: Path, text: str) -> None:
    home.mkdir(exist_ok=True)
    (home / "plan.json").write_text(text)
    assert made().correction == 1.0 and made().pace is None
    learn.remember(made(), made().peak_memory_bytes)
    assert made().correction == pytest.approx(1.0, rel=1e-3)


def test_the_file_is_private_and_holds_numbers_alone(home: Path) -> None:
    learn.remember(made(), 1 << 30, 1e-6)
    file = home / "plan.json"
    assert file.stat().st_mode & 0o777 == 0o600 and [entry.name for entry in home.iterdir()] == ["plan.json"]
    (kind, entry), *others = json.loads(file.read_text()).items()
    assert kind == "cpu, 32 bits, layers kept" and not others
    assert entry.keys() == {"correction", "seconds"} and all(isinstance(value, float) for value in entry.values())
