"""`runs list | show | path | remove`, what `train` says of runs that can't go on, and an early kill."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_lora import paths
from mlx_lora.store import run as runs

Run = Callable[..., Any]


def test_a_run_is_listed_shown_found_and_removed(run: Run, trained: Any, home: Path) -> None:
    (entry,) = run("runs", "list", "--json").json
    assert {key: entry[key] for key in ("name", "state", "step", "steps", "stopped_by")} == {
        "name": "mine", "state": "finished", "step": 4, "steps": 4, "stopped_by": "iters",
    }  # fmt: skip
    assert "finished" in run("runs", "list").out
    shown = run("runs", "show", "mine")
    assert "mine is finished, 4 of 4 steps: all its steps are done" in shown.out
    assert "adapter.rank=4" in shown.out and "train.iters=4" in shown.out and "adapter.alpha" not in shown.out
    details = run("runs", "show", "mine", "--json").json
    assert details["settings"]["train.learning_rate"] == 0.01 and details["losses"][-1]["step"] == 4
    assert run("runs", "path", "mine").out.strip() == str(home / "runs" / "mine")
    asked = run("runs", "remove", "mine")
    assert asked.code == 1 and "--yes removes without asking" in asked.err
    assert run("runs", "remove", "mine", "--yes").code == 0
    assert run("runs", "list", "--json").json == [] and (home / "adapters" / "mine").is_dir()
    missing = run("runs", "show", "mine")
    assert missing.code == 1 and "no run 'mine'" in missing.err


def test_runs_remove_clears_a_folder_without_an_adapter(run: Run, home: Path) -> None:
    (home / "runs" / "mine").mkdir(parents=True)
    assert "abandoned" in run("runs", "list").out
    assert "runs remove mine" in run("runs", "show", "mine").err
    assert run("runs", "remove", "mine", "--yes").code == 0 and not (home / "runs" / "mine").exists()


def test_resume_of_a_finished_run_and_of_a_name_that_is_not_there(run: Run, trained: Any) -> None:
    finished = run("train", "--name", "mine", "--resume")
    assert finished.code == 1 and "run 'mine' is finished after 4 steps: all its steps are done" in finished.err
    assert "--force train.iters=8 trains it anew for longer" in finished.err
    missing = run("train", "--name", "mien", "--resume")
    assert missing.code == 1 and "no run 'mien'; did you mean 'mine'?" in missing.err


def start(home: Path, *words: str) -> subprocess.Popen[str]:
    """`mlx-lora` in a process of its own, in which a twentieth of a second is what may be lost."""
    code = (
        "import sys; from mlx_lora.train import saving; saving.SAVE_SECONDS, saving.MOST_SHARE = 0.05, 1.0; "
        "from mlx_lora.cli import main; main(sys.argv[1:])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"MLX_LORA_HOME": str(home)},
    )  # fmt: skip


def until(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.real
def test_kill_after_a_few_steps_loses_little_without_a_setting(
    run: Run, home: Path, tiny_path: Path, data: Path
) -> None:
    """`save_every` is `auto` by default: kill -9, then `--resume` goes on from what is at most an interval ago."""
    words = ["train", "--model", str(tiny_path), "--data", str(data), "--name", "mine", "train.iters=100000"]
    process = start(home, *words)
    until(lambda: bool(list((home / "runs" / "mine").glob("checkpoint-*"))), process)
    process.kill()
    process.communicate()
    record = runs.read("mine")
    assert record.state == "unfinished" and 0 < record.checkpoints[-1] <= record.step < 1000
    assert run("adapters", "list", "--json").json == []
    assert "mlx-lora train --name mine --resume goes on from step" in run("runs", "show", "mine").err


@pytest.mark.real
@pytest.mark.parametrize("number", [2, 15])
def test_a_signal_under_force_keeps_the_finished_adapter(
    run: Run, trained: Any, home: Path, tiny_path: Path, data: Path, number: int
) -> None:
    """`train --force` over a finished adapter, Ctrl-C after some steps: what is said, and what is there."""
    adapter = paths.room("adapters", "mine") / "adapters.safetensors"
    before = adapter.read_bytes()
    words = ["train", "--model", str(tiny_path), "--data", str(data), "--name", "mine", "--force", "seed=9"]
    process = start(home, *words, "train.iters=100000")
    until(lambda: bool(list((home / "runs" / "mine").glob("checkpoint-*"))), process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in errors
    assert "the adapter 'mine' is still the one from before, until the run has finished" in errors
    assert "mlx-lora train --name mine --resume goes on" in errors
    assert adapter.read_bytes() == before
    (entry,) = run("adapters", "list", "--json").json
    assert entry["state"] == "finished" and runs.read("mine").state == "unfinished"


@pytest.mark.real
def test_adapters_list_says_unfinished_after_an_interruption(run: Run, home: Path, tiny_path: Path, data: Path) -> None:
    words = ["train", "--model", str(tiny_path), "--data", str(data), "--name", "mine", "train.iters=100000"]
    process = start(home, *words)
    until(lambda: bool(list((home / "runs" / "mine").glob("checkpoint-*"))), process)
    process.send_signal(2)
    process.communicate(timeout=60)
    assert [entry["state"] for entry in run("adapters", "list", "--json").json] == ["unfinished"]
    assert "unfinished" in run("adapters", "list").out
