"""The recorded figures: nothing private in them, and the README says what they say. Nothing is measured here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bench import plots, results, tables
from tests.bench.cases.mlx_lm import check_same_work
from tests.bench.process import Failed, summary

RECORDS = sorted(results.FOLDER.glob("*.json"))


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: file.stem)
def test_a_record_says_how_it_was_made_and_names_no_place(file: Path) -> None:
    record: dict[str, Any] = json.loads(file.read_text())
    assert record.keys() == {"name", "command", "date", "machine", "figures"}
    assert record["name"] == file.stem in results.names()
    assert record["command"].startswith(f"python -m tests.bench {file.stem}")
    assert record["machine"].keys() == {
        "cpu", "cores", "memory_bytes", "device", "openblas", "compiled_kernels", "versions",
    }  # fmt: skip
    assert "/" not in file.read_text().replace("s/step", ""), "a path"


def test_documents_say_what_was_measured() -> None:
    for file, text in tables.written().items():
        assert file.read_text(encoding="utf-8") == text, "run: python -m tests.bench --tables"


def test_every_benchmark_measures_and_draws() -> None:
    for name in results.names():
        case = results.case(name)
        assert callable(case.measure) and callable(case.tables) and case.__doc__


def test_sides_that_do_other_work_are_not_compared() -> None:
    ours = {"trainable_parameters": 8, "trained_tokens": 4, "losses": [2.0, 1.0]}
    check_same_work(ours, {**ours, "losses": [2.0001]})
    for change in ({"trainable_parameters": 9}, {"trained_tokens": 5}, {"losses": [2.1]}):
        with pytest.raises(Failed):
            check_same_work(ours, {**ours, **change})


def test_plots_are_drawn_from_records(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    side = {"seconds": 1.0, "peak_bytes": 1e9}
    lengths = {length: {"ours": side, "mlx_lm, checkpointing": side} for length in ("128", "512")}
    plots.draw({"length": {"figures": {"bases": {"float32": lengths, "4-bit": lengths}}}}, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"length-memory.png", "length-time.png"}


def test_a_summary_is_the_median_of_all_steps_and_the_highest_peak() -> None:
    runs = [
        {"seconds": [1.0, 3.0], "peak_bytes": 5, "losses": [2.0]},
        {"seconds": [9.0], "peak_bytes": 7, "losses": []},
    ]
    assert summary(runs) == {"seconds": 3.0, "peak_bytes": 7, "losses": [2.0], "runs": 2, "steps": 3}
    assert tables.markdown("T", ["a", "b"], [["x", 0.12345]]) == "T\n\n| a | b |\n|---|---:|\n| x | 0.123 |\n"
