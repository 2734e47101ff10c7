"""`bench`: the JSON that programs rely on, and a table for people."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ran

WORDS = ("bench", "--rows", 1, "--length", 8, "--by-length", 8)


@pytest.mark.parametrize(
    "options", [pytest.param((), id="as it is"), pytest.param(("--quantize", 4), id="4-bit", marks=pytest.mark.real)]
)
def test_results_have_a_name_a_value_and_a_unit(run: Callable[..., Ran], tiny_path: Path, options: tuple) -> None:  # type: ignore[type-arg]
    ran = run(*WORDS, "--model", tiny_path, *options, "--json")
    assert ran.code == 0 and ran.json["results"]
    assert all(entry.keys() == {"name", "value", "unit"} for entry in ran.json["results"])


@pytest.mark.real
def test_the_embedded_base_is_the_default_and_people_get_a_table(run: Callable[..., Ran]) -> None:
    ran = run(*WORDS)
    assert ran.code == 0
    assert "step / matrix products" in ran.out and "trained tokens" in ran.out
    assert "GFLOP/s" in ran.out and " ms" in ran.out


def test_bits_that_no_mode_has_are_refused(run: Callable[..., Ran]) -> None:
    ran = run(*WORDS, "--quantize", 7)
    assert ran.code == 1 and "quantize" in ran.err
