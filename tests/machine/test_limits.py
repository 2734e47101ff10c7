"""How much of a machine training may take, and when it has taken too much."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mlx_lora.machine import limits

GIB = 1 << 30


def free(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    monkeypatch.setattr(limits.psutil, "virtual_memory", lambda: SimpleNamespace(available=available))


@pytest.mark.parametrize(
    ("memory_gb", "share"), [(8, 2 / 3), (16, 2 / 3), (32, 2 / 3), (36, 3 / 4), (64, 3 / 4), (0.5, 2 / 3)]
)
def test_another_machine_gives_what_metal_recommends_for_its_size(memory_gb: float, share: float) -> None:
    assert limits.limit_bytes(memory_gb=memory_gb) == pytest.approx(memory_gb * GIB * share, abs=1)


@pytest.mark.processor("has what other programs leave")
def test_this_machine_gives_most_of_what_is_free_and_what_is_held_already(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 10 * GIB)
    held = mx.get_active_memory()
    assert limits.limit_bytes() == pytest.approx(held + 9 * GIB, abs=1 << 20)


def test_a_recipe_may_ask_for_less_and_never_get_more(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 10 * GIB)
    assert limits.limit_bytes(setting=2.5) == 2.5 * GIB
    assert limits.limit_bytes(setting=1000) == 1000 * GIB > limits.limit_bytes(), "also above what is recommended"
    assert limits.limit_bytes(memory_gb=8, setting=1) == GIB


def test_on_a_gpu_the_limit_is_its_working_set(monkeypatch: pytest.MonkeyPatch) -> None:
    facts: dict[str, Any] = {"max_recommended_working_set_size": 11_453_251_584}
    monkeypatch.setattr(limits.device, "on_gpu", lambda: True)
    monkeypatch.setattr(limits.mx, "device_info", lambda: facts)
    assert limits.limit_bytes() == 11_453_251_584


@pytest.mark.parametrize(
    ("peak", "available", "says"),
    [
        (GIB, 10 * GIB, None),
        (int(2.1 * GIB), 10 * GIB, None),  # what a plan may be off by
        (3 * GIB, 10 * GIB, "over the limit of 2.15 GB"),
        (GIB, 100 << 20, "only 105 MB of this machine's memory is left"),
    ],
)
def test_a_step_over_the_limit_and_a_machine_about_to_swap_are_reasons_to_stop(
    peak: int, available: int, says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, available)
    monkeypatch.setattr(limits.mx, "get_peak_memory", lambda: peak)
    reason = limits.exceeded(2 * GIB)
    assert reason is None if says is None else reason and says in reason


def test_an_overruled_limit_stops_nothing_and_a_machine_about_to_swap_still_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free(monkeypatch, 10 * GIB)
    monkeypatch.setattr(limits.mx, "get_peak_memory", lambda: 99 * GIB)
    assert limits.exceeded(None) is None
    free(monkeypatch, 100 << 20)
    assert limits.exceeded(None)


def test_what_is_held_beside_mlx_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 10 * GIB)
    monkeypatch.setattr(limits.mx, "get_peak_memory", lambda: 2 * GIB)
    assert limits.exceeded(2 * GIB) is None and limits.exceeded(2 * GIB, beside=GIB)
