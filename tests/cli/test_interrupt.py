"""Signals while training: before the first step nothing is left, after it the adapter is saved, with the right code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def start(home: Path, tiny_path: Path, data: Path) -> subprocess.Popen[str]:
    words = ["train", "--model", str(tiny_path), "--data", str(data), "--name", "mine", "train.iters=100000"]
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_lora", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"MLX_LORA_HOME": str(home)},
    )  # fmt: skip


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_adapter(home: Path, tiny_path: Path, data: Path, number: int, code: int) -> None:
    process = start(home, tiny_path, data)
    metrics = home / "runs" / "mine" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.is_file() and '"event": "step"' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in errors
    assert (home / "adapters" / "mine" / "manifest.json").is_file()
    assert "mlx-lora train --name mine --resume goes on" in errors
    assert len(list((home / "runs" / "mine").glob("checkpoint-*"))) == 1


def test_a_signal_before_training_leaves_nothing(home: Path, tiny_path: Path, data: Path) -> None:
    process = start(home, tiny_path, data)
    assert process.stderr is not None
    assert any(line.startswith("loading") for line in process.stderr)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert not (home / "adapters" / "mine").exists() and not (home / "runs" / "mine").exists()
