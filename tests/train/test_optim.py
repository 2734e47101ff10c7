"""Schedules at their corners."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_lora.config import Train
from mlx_lora.train.optim import schedule


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("constant", {0: 0.25, 3: 1.0, 4: 1.0, 22: 1.0, 40: 1.0}),
        ("linear", {0: 0.25, 3: 1.0, 4: 1.0, 22: 0.5, 40: 0.0}),
        ("cosine", {0: 0.25, 3: 1.0, 4: 1.0, 22: 0.5, 40: 0.0, 50: 0.0}),
    ],
)
def test_schedule(shape: str, expected: dict[int, float]) -> None:
    rate = schedule(Train(schedule=shape, warmup=0.1, learning_rate=1.0), 40)
    for step, value in expected.items():
        assert rate(mx.array(step)).item() == pytest.approx(value, abs=1e-6), step


def test_without_warmup_the_first_step_has_the_full_rate() -> None:
    assert schedule(Train(warmup=0.0, learning_rate=0.5), 10)(mx.array(0)).item() == 0.5
