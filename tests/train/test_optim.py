"""Schedules at their corners, and LoRA+'s two rates."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter
from mlx_lora.errors import TrainingError
from mlx_lora.models.load import LoadedModel
from mlx_lora.train.optim import build, schedule
from tests.fixed import fixed
from tests.train.test_trainer import arrays_of, make_rows, run


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("constant", {0: 0.25, 3: 1.0, 4: 1.0, 22: 1.0, 40: 1.0}),
        ("linear", {0: 0.25, 3: 1.0, 4: 1.0, 22: 0.5, 40: 0.0}),
        ("cosine", {0: 0.25, 3: 1.0, 4: 1.0, 22: 0.5, 40: 0.0, 50: 0.0}),
    ],
)
def test_schedule(shape: str, expected: dict[int, float]) -> None:
    rate = schedule(fixed(schedule=shape, warmup=0.1, learning_rate=1.0), 40)
    for step, value in expected.items():
        assert rate(mx.array(step)).item() == pytest.approx(value, abs=1e-6), step


def test_without_warmup_the_first_step_has_the_full_rate() -> None:
    assert schedule(fixed(warmup=0.0, learning_rate=0.5), 10)(mx.array(0)).item() == 0.5


def test_b_learns_at_the_ratio_times_the_rate(tiny: LoadedModel) -> None:
    """After one step of SGD everything has moved along one gradient: B by the ratio more, A as without."""
    start = {
        f"{path}.{name}": np.array(array)
        for path, wrapper in attach(tiny.model, Adapter(rank=4, init="pissa")).items()
        for name, array in wrapper.adapter_arrays().items()
    }
    settings: dict[str, Any] = {"optimizer": "sgd", "iters": 1, "learning_rate": 1.0, "schedule": "constant"}
    moved = []
    for ratio in (None, 4.0):
        arrays = arrays_of(
            run(tiny, make_rows(4), [], adapter=Adapter(rank=4, init="pissa"), loraplus_ratio=ratio, **settings)
        )
        moved.append({name: np.array(array) - start[name] for name, array in arrays.items()})
    for name, once in moved[0].items():
        expected = (4 if name.endswith("lora_b") else 1) * once
        assert np.abs(once).max() > 1e-5
        np.testing.assert_allclose(moved[1][name], expected, rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lion", "adafactor", "muon"])
def test_every_optimizer_has_two_rates(name: str) -> None:
    ones = tree_unflatten([("layers.1.lora_a", mx.ones((4, 4))), ("layers.1.lora_b", mx.ones((4, 4)))])
    settings = fixed(optimizer=name, learning_rate=1e-3, loraplus_ratio=8, warmup=0.0, schedule="constant")
    optimizer = build(settings, 10)
    optimizer.init(ones)
    after = dict(tree_flatten(optimizer.apply_gradients(ones, ones)))
    a, b = (1 - after[f"layers.1.{factor}"].mean().item() for factor in ("lora_a", "lora_b"))
    assert a > 1e-5 and b == pytest.approx(8 * a, rel=1e-2)


def test_a_rate_for_lora_b_needs_one(tiny: LoadedModel) -> None:
    with pytest.raises(TrainingError, match="this adapter has none"):
        run(tiny, make_rows(4), [], adapter=Adapter(method="bitfit"), loraplus_ratio=16, iters=1)


def test_the_names_of_a_state_stay_what_they_were() -> None:
    optimizer = build(fixed(), 10)
    optimizer.init({"x": mx.ones((2,))})
    assert {name for name, _ in tree_flatten(optimizer.state)} == {"step", "learning_rate", "x.m", "x.v"}
