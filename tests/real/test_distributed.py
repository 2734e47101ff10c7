"""Two processes of MLX's own launcher train what one process trains: the same losses, one adapter, one voice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_lora import paths

pytestmark = pytest.mark.real
STEPS = 20
# two processes share the processor here: more threads than cores would only wait for each other
ALONE = {"OPENBLAS_NUM_THREADS": "1"}


def train(home: Path, name: str, *launcher: str, words: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Train the notes task for some steps, with `launcher` in front of the command."""
    tool = str(Path(sys.executable).with_name("mlx-lora"))
    settings = [
        f"train.iters={STEPS}",
        "train.batch_size=7",
        "train.grad_accumulation=2",
        "train.eval_every=10",
        *words,
    ]
    model, data = paths.bundled("data") / "base", paths.bundled("data") / "tasks" / "notes"
    command = [
        *launcher,
        tool,
        "train",
        "--model",
        str(model),
        "--data",
        str(data),
        "--name",
        name,
        "--json",
        *settings,
    ]
    environment = os.environ | ALONE | {"MLX_LORA_HOME": str(home)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def launcher(processes: int) -> tuple[str, ...]:
    tool = str(Path(sys.executable).with_name("mlx.launch"))
    return (tool, "-n", str(processes), "--backend", "ring", "--")


def metrics(home: Path, name: str, event: str, key: str) -> list[float]:
    lines = [json.loads(line) for line in (home / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if line["event"] == event]


def test_two_processes_have_the_loss_curve_of_one(tmp_path: Path) -> None:
    one, two = train(tmp_path, "one"), train(tmp_path, "two", *launcher(2))
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    for event, key in (("step", "loss"), ("evaluated", "loss"), ("step", "tokens"), ("finished", "computed_tokens")):
        alone, together = (metrics(tmp_path, name, event, key) for name in ("one", "two"))
        assert len(alone) == len(together) == {"step": STEPS, "evaluated": 3, "finished": 1}[event]
        if key == "loss":
            assert together == pytest.approx(alone, rel=1e-4)
        elif key == "tokens":
            assert together == alone, "the tokens of a step are those of all processes"
    spoken = [line for line in two.stdout.splitlines() if line.startswith("{")]
    assert len(spoken) == 1, "one process speaks for all"
    assert json.loads(spoken[0])["trained_tokens"] == json.loads(one.stdout.splitlines()[-1])["trained_tokens"]
    assert two.stderr.count("step 10: validation loss") == 1
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == ["one", "two"]


def test_an_error_in_one_process_ends_all(tmp_path: Path) -> None:
    (tmp_path / "adapters" / "taken").mkdir(parents=True)
    done = train(tmp_path, "taken", *launcher(2))
    assert "an adapter 'taken' exists" in done.stderr and "Traceback" not in done.stderr
    said = done.stdout + done.stderr  # the launcher itself always ends with 0
    assert "rank 0 exited with code 1" in said and "rank 1 exited with code" in said
    assert not list((tmp_path / "adapters" / "taken").iterdir())
