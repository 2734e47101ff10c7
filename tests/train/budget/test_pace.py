"""The pace of products, timed."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_lora.train.budget import learn, pace
from tests.train.budget.test_costs import cost


@pytest.mark.real
@pytest.mark.parametrize("bits", [None, 4])
def test_a_multiplication_takes_the_same_in_wide_and_narrow_products_about(
    bits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault in counting them would show as a factor of the width."""
    monkeypatch.setattr(pace, "SECONDS", 0.1)
    narrow, wide = (pace.measured(hidden=hidden, bits=bits, dtype=mx.float32, gpu=False) for hidden in (256, 1024))
    assert 1e-13 < wide and 1 / 16 < wide / narrow < 3


def test_products_are_timed_once_for_each_kind(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "SECONDS", 0.01)
    first = learn.pace_of_products(cost())
    monkeypatch.setattr(pace, "measured", lambda **_: 1.0)
    assert learn.pace_of_products(cost()) == first and learn.pace_of_products(cost(bits=4)) == 1.0
    assert learn.experience("cpu, 32 bits, layers kept").seconds is None, "that is for runs to tell"
