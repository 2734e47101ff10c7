"""kill −9 at random moments, then `--resume` until the run is done: the bytes of the run that was never killed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import write_model

pytestmark = pytest.mark.real
STEPS, KILLS = 40, 40
COMMON = [
    f"train.iters={STEPS}", "train.save_every=3", "train.eval_every=10", "train.batch_size=2",
    "data.valid_fraction=0.2", "train.learning_rate=0.005", "adapter.rank=4", "adapter.dropout=0.1",
    "train.grad_accumulation=2", "data.template=none", "--json",
]  # fmt: skip
CASES = {
    "adamw": [],
    "adam": ["train.optimizer=adam"],
    "sgd": ["train.optimizer=sgd"],
    "lion": ["train.optimizer=lion"],
    "adafactor": ["train.optimizer=adafactor"],
    "muon": ["train.optimizer=muon"],
    "packing": ["data.packing=true"],
    "prefix": ["train.cache_prefix=on", "adapter.layers=1"],
}


class Runs:
    """Runs of one recipe as commands of their own, in one home."""

    def __init__(self, folder: Path, case: list[str]):
        self.home = folder / "home"
        model = write_model(folder / "tiny")
        rows = [{"prompt": f"What is {number} plus 1?", "completion": f"{number + 1}"} for number in range(40)]
        data = folder / "rows.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        self.words = ["train", "--model", str(model), "--data", str(data), *COMMON, *case]

    def start(self, name: str, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "mlx_lora", *self.words, "--name", name, *more]
        env = os.environ | {"MLX_LORA_HOME": str(self.home), "OPENBLAS_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    def finish(self, name: str, *more: str) -> None:
        process = self.start(name, *more)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors

    def weights(self, name: str) -> bytes:
        return (self.home / "adapters" / name / "adapters.safetensors").read_bytes()

    def steps(self, name: str) -> int:
        """How far a run has come, by its metrics; 0 while there are none, as when `--force` has just removed them."""
        with suppress(FileNotFoundError):
            return (self.home / "runs" / name / "metrics.jsonl").read_text().count('"event": "step"')
        return 0

    def kill_at(self, name: str, moment: float, *more: str) -> bool:
        """Kill a run where it has done that share of its steps and a bit; whether it was still running."""
        with self.start(name, *more) as process:
            try:
                while process.poll() is None and self.steps(name) < moment * STEPS:
                    time.sleep(0.005)
                time.sleep(moment % 0.01)  # anywhere within a step
                return process.poll() is None
            finally:
                process.kill()


def test_killed_runs_end_in_the_same_bytes(tmp_path: Path) -> None:
    def killed(name: str) -> int:
        """One recipe whole, and again killed at random moments and resumed until done; how often it was killed."""
        runs, generator = Runs(tmp_path / name.replace(", ", "-"), CASES[name]), random.Random(name)
        runs.finish("whole")
        kills, more = 0, ["--force"]
        for moment in sorted(generator.random() for _ in range(KILLS // len(CASES))):
            kills += runs.kill_at("killed", moment, *more)
            more = ["--resume"] if list((runs.home / "runs" / "killed").glob("checkpoint-*")) else ["--force"]
        runs.finish("killed", *more)
        assert runs.weights("killed") == runs.weights("whole"), f"{name}: other bytes"
        assert runs.steps("killed") == STEPS
        return kills

    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(killed, CASES)) == KILLS
