"""`plan`: the keys that programs rely on, words for people, and an exit code that doesn't judge."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ran

Run = Callable[..., Ran]


def test_plan_prints_its_keys_and_parts_that_add_up(run: Run, tiny_path: Path, data: Path) -> None:
    ran = run("plan", "--model", tiny_path, "--data", data, "--json")
    assert ran.code == 0
    facts = ran.json
    assert facts.keys() >= {"fits", "peak_memory_bytes", "parts", "limit_bytes", "suggestion"}
    assert facts["parts"].keys() == {"weights", "adapter", "optimizer", "activations", "loss", "overhead"}
    assert sum(facts["parts"].values()) == facts["peak_memory_bytes"] <= facts["limit_bytes"]
    assert facts["fits"] is True and facts["suggestion"] is None and facts["seconds_from"] == "products"


def test_plan_answers_no_with_a_suggestion_and_code_0(run: Run, tiny_path: Path) -> None:
    words = ["plan", "--model", tiny_path, "train.memory_limit_gb=0.02", "train.grad_checkpoint=off"]
    ran = run(*words, "--json")
    assert ran.code == 0 and ran.json["fits"] is False and ran.json["limit_bytes"] == int(0.02 * 2**30)
    overrides = ran.json["suggestion"]
    assert overrides and run(*words, *overrides, "--json").json["fits"] is True
    shown = run(*words)
    assert shown.code == 0 and "doesn't fit" in shown.out and f"would fit: {' '.join(overrides)}" in shown.out
    assert "all the same: train.memory_limit_gb=" in shown.out


def test_plan_for_people(run: Run, tiny_path: Path) -> None:
    ran = run("plan", "--model", tiny_path, "data.max_seq_length=129")
    assert ran.code == 0 and ": fits" in ran.out and "gradient checkpointing off" in ran.out
    assert "not known yet" in ran.out, "without rows and iters there is no amount of work"
    assert all(part in ran.out for part in ("weights", "adapter", "optimizer", "activations", "loss", "overhead"))


@pytest.mark.parametrize("memory_gb", [8, 16, 32, 64])
def test_plan_for_another_machine(memory_gb: int, run: Run, tiny_path: Path) -> None:
    facts = run("plan", "--model", tiny_path, "--memory-gb", memory_gb, "--device", "gpu", "--json").json
    assert memory_gb * 0.6 * 2**30 < facts["limit_bytes"] < memory_gb * 2**30 and facts["fits"]


def test_plan_reads_a_recipe_without_its_data_and_without_weights(run: Run, tiny_path: Path, tmp_path: Path) -> None:
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text((tiny_path / "config.json").read_text())
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data: {path: not-there.jsonl, max_seq_length: 129}\nadapter: {rank: 4}\n")
    facts = run("plan", recipe, "adapter.rank=16", "--model", tmp_path / "shape", "--json").json
    assert facts["micro_batch"] == {"lines": 4, "width": 128, "trained": 512}


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--model", "nowhere"], 1, "nowhere"),
        ([], 1, "--model MODEL"),
        (["adapter.rnak=2"], 1, "did you mean"),
        (["--memory-gb", "none"], 2, "memory-gb"),
        (["--memory-gb", "-1"], 2, "memory-gb"),
    ],
)
def test_plan_says_what_is_wrong(words: list[str], code: int, says: str, run: Run) -> None:
    ran = run("plan", *words)
    assert ran.code == code and says in ran.err


def test_a_first_plan_tells_a_time_from_a_short_measurement_and_which_it_is(run: Run, tiny_path: Path) -> None:
    """A first plan said nothing of time."""
    words = ["plan", "--model", tiny_path, "data.max_seq_length=129", "train.iters=50"]
    began = time.perf_counter()
    first = run(*words, "--json").json
    assert first["seconds_from"] == "products" and first["seconds"] > 0 and time.perf_counter() - began < 20
    assert run(*words, "--json").json["seconds"] == first["seconds"], "measured once and kept"
    longer = run(*words[:-1], "train.iters=100", "--json").json
    assert longer["seconds"] == pytest.approx(2 * first["seconds"])
    assert "products timed on this machine" in run(*words).out
    elsewhere = run(*words, "--memory-gb", 8, "--device", "gpu", "--json").json
    assert elsewhere["seconds"] is None and elsewhere["seconds_from"] is None, "another machine's pace isn't known here"


def test_plan_serve_says_how_many_requests_fit(run: Run, tiny_path: Path) -> None:
    facts = run("plan", "--serve", "--model", tiny_path, "--memory-gb", 16, "--json").json
    assert facts["fits"] and facts["rows"] == 32 and facts["row_tokens"] == 2048
    assert sum(facts["parts"].values()) == facts["peak_memory_bytes"] <= facts["limit_bytes"]
    shown = run("plan", "--serve", "--model", tiny_path)
    assert "prompt cache" in shown.out and ": fits" in shown.out and "32 requests of 2,048 tokens" in shown.out
    refused = run("plan", "--serve", "--model", tiny_path, "train.iters=3")
    assert refused.code != 0 and "without recipe" in refused.err
