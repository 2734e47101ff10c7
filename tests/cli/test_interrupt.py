"""Signals while training: before the first step nothing is left, after it the adapter is saved, with the right code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def start(home: Path, tiny_path: Path, data: Path, ignored: int | None = None) -> subprocess.Popen[str]:
    """A training process, started to ignore the signal `ignored`."""

    def signals() -> None:
        if ignored is not None:
            signal.signal(ignored, signal.SIG_IGN)

    words = ["train", "--model", str(tiny_path), "--data", str(data), "--name", "mine", "train.iters=100000"]
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_lora", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"MLX_LORA_HOME": str(home)},
        preexec_fn=signals,
    )  # fmt: skip


def until_a_step(process: subprocess.Popen[str], home: Path, at_least: int = 1) -> int:
    """Wait for `at_least` steps in the metrics of the run; returns how many there are."""
    metrics, deadline = home / "runs" / "mine" / "metrics.jsonl", time.monotonic() + 60
    while True:
        steps = metrics.read_text().count('"event": "step"') if metrics.is_file() else 0
        if steps >= at_least:
            return steps
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.real)]
)
def test_a_signal_saves_the_adapter(home: Path, tiny_path: Path, data: Path, number: int, code: int) -> None:
    process = start(home, tiny_path, data)
    until_a_step(process, home)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in errors
    assert (home / "adapters" / "mine" / "manifest.json").is_file()
    assert "mlx-lora train --name mine --resume goes on" in errors
    assert len(list((home / "runs" / "mine").glob("checkpoint-*"))) == 1


@pytest.mark.real
def test_a_signal_before_training_leaves_nothing(
    home: Path, tiny_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # MLX's CPU backend looks for a C++ compiler with system(), and for those 10 ms the C library ignores Ctrl-C.
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    process = start(home, tiny_path, data)
    assert process.stderr is not None
    assert any(line.startswith("loading") for line in process.stderr)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert not (home / "adapters" / "mine").exists() and not (home / "runs" / "mine").exists()


@pytest.mark.real
def test_a_signal_ignored_from_the_start_stays_ignored(home: Path, tiny_path: Path, data: Path) -> None:
    """As nohup asks for SIGHUP: the run goes on when the terminal closes."""
    process = start(home, tiny_path, data, ignored=signal.SIGHUP)
    steps = until_a_step(process, home)
    process.send_signal(signal.SIGHUP)
    until_a_step(process, home, steps + 2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in errors
