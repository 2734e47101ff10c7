"""Processes of MLX's own launcher train what one process trains, end together, and go on to the same bytes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_lora import paths
from mlx_lora.machine import offline
from tests.conftest import questions, write_model

pytestmark = pytest.mark.real
STEPS = 20
# two processes share the processor here: more threads than cores would only wait for each other
ALONE = {"OPENBLAS_NUM_THREADS": "1"}


def launcher(processes: int) -> tuple[str, ...]:
    """The command line that starts `processes`, on ports that nobody uses at this moment."""
    with offline.may_listen("127.0.0.1", 0), socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = min(free.getsockname()[1], 65000)
    tool = str(Path(sys.executable).with_name("mlx.launch"))
    return (tool, "-n", str(processes), "--backend", "ring", "--starting-port", str(port), "--")


def start(home: Path, *words: str, processes: int = 1) -> subprocess.Popen[str]:
    """`mlx-lora train` with `words`, as one process or several."""
    started_by = launcher(processes) if processes > 1 else ()
    command = [*started_by, sys.executable, "-m", "mlx_lora", "train", *words]
    environment = os.environ | ALONE | {"MLX_LORA_HOME": str(home)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def train(home: Path, *words: str, processes: int = 1) -> tuple[str, str]:
    """Run it to its end; stdout and stderr."""
    out, errors = start(home, *words, processes=processes).communicate(timeout=300)
    assert "Traceback" not in errors
    return out, errors


def notes_task(name: str) -> list[str]:
    """The notes task for some steps."""
    model, data = paths.bundled("data") / "base", paths.bundled("data") / "tasks" / "notes"
    settings = [f"train.iters={STEPS}", "train.batch_size=7", "train.grad_accumulation=2", "train.eval_every=10"]
    return ["--model", str(model), "--data", str(data), "--name", name, "--json", *settings]


def tiny_task(folder: Path, name: str, *words: str) -> list[str]:
    """Rows that a tiny model learns, with dropout, so that every process draws random numbers of its own."""
    model, data = folder / "tiny", folder / "data"
    if not model.is_dir():
        write_model(model)
        data.mkdir()
        for split, count in (("train", 40), ("valid", 8)):
            (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions(count)))
    return ["--model", str(model), "--data", str(data), "--name", name, "adapter.dropout=0.2", *words]


def metrics(home: Path, name: str, event: str, key: str) -> list[float]:
    file = home / "runs" / name / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [line[key] for line in lines if line["event"] == event]


def weights(home: Path, name: str) -> bytes:
    return (home / "adapters" / name / "adapters.safetensors").read_bytes()


def until(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids of the ranks that a launcher started."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and f"PPid:\t{process.pid}\n" in (folder / "status").read_text():
                values = dict(item.partition("=")[::2] for item in (folder / "environ").read_text().split("\0"))
                found[int(values["MLX_RANK"])] = int(folder.name)
        except (OSError, KeyError):
            continue
    return found


def exit_codes(said: str) -> list[str]:
    """What the launcher, which itself always ends with 0, says of its processes."""
    return sorted(re.findall(r"rank \d exited with code -?\d+", said))


def test_two_processes_have_the_loss_curve_of_one(tmp_path: Path) -> None:
    one, _ = train(tmp_path, *notes_task("one"))
    two, errors = train(tmp_path, *notes_task("two"), processes=2)
    for event, key in (("step", "loss"), ("evaluated", "loss"), ("step", "tokens"), ("finished", "computed_tokens")):
        alone, together = (metrics(tmp_path, name, event, key) for name in ("one", "two"))
        assert len(alone) == len(together) == {"step": STEPS, "evaluated": 3, "finished": 1}[event], errors
        if key == "loss":
            assert together == pytest.approx(alone, rel=1e-4)
        elif key == "tokens":
            assert together == alone, "the tokens of a step are those of all processes"
    spoken = [line for line in two.splitlines() if line.startswith("{")]
    assert len(spoken) == 1, "one process speaks for all"
    assert json.loads(spoken[0])["trained_tokens"] == json.loads(one.splitlines()[-1])["trained_tokens"]
    assert errors.count("step 10: validation loss") == 1
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == ["one", "two"]


def test_an_error_in_one_process_ends_all(tmp_path: Path) -> None:
    (tmp_path / "adapters" / "taken").mkdir(parents=True)
    out, errors = train(tmp_path, *notes_task("taken"), processes=2)
    assert errors.count("error: an adapter 'taken' exists") == 1
    assert exit_codes(out + errors) == ["rank 0 exited with code 1", "rank 1 exited with code 1"]
    assert not list((tmp_path / "adapters" / "taken").iterdir())


@pytest.mark.parametrize("fault", ["recipe", "data", "plan", "loading"])
def test_one_that_fails_before_it_starts_ends_all_with_its_reason(tmp_path: Path, fault: str) -> None:
    """The machines have the same command line, and not the same files, memory or model."""
    words = tiny_task(tmp_path, "mine", "train.iters=100000")
    other, model = tmp_path / "other", tmp_path / "tiny"
    other.mkdir()
    if fault == "recipe":
        (tmp_path / "mine.yaml").write_text("seed: 1\n")
        words = ["mine.yaml", *words]
    elif fault == "data":
        words[words.index("--data") + 1] = "data"
        (other / "data").mkdir()
        (other / "data" / "train.jsonl").write_text("{\n")
    elif fault == "plan":
        limit = "machine.limits.limit_bytes = lambda **_: 1"
    else:
        words[words.index("--model") + 1] = "tiny"
        (other / "tiny").mkdir()
        for file in model.iterdir():
            data = file.read_bytes()
            (other / "tiny" / file.name).write_bytes(data[:-100] if file.suffix == ".safetensors" else data)
    lower = f"import mlx_lora.machine.limits\nmlx_lora.{limit}\n" if fault == "plan" else ""
    script = tmp_path / "each.py"
    script.write_text(
        "import os, sys\n"
        f"os.chdir({str(tmp_path)!r} if os.environ['MLX_RANK'] == '0' else {str(other)!r})\n"
        f"if os.environ['MLX_RANK'] == '1':\n    pass\n    {lower.strip().replace(chr(10), chr(10) + '    ')}\n"
        f"from mlx_lora.cli import main\nmain(['train', *{words!r}])\n"
    )
    environment = os.environ | ALONE | {"MLX_LORA_HOME": str(tmp_path / "home")}
    began = time.monotonic()
    done = subprocess.run(
        [*launcher(2), sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=120
    )
    said = done.stdout + done.stderr
    reasons = {"recipe": "no such recipe", "data": "train.jsonl", "plan": "training would take", "loading": "tiny"}
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: process 2 of 2: ") and reasons[fault] in line, said
    assert exit_codes(said) == ["rank 0 exited with code 1", "rank 1 exited with code 1"], said
    assert "Traceback" not in said and time.monotonic() - began < 60
    assert not (tmp_path / "home" / "runs" / "mine").exists()


@pytest.mark.parametrize("killed", [0, 1])
def test_one_that_is_killed_ends_all_and_the_run_goes_on_to_the_same_bytes(tmp_path: Path, killed: int) -> None:
    """A run of two ends within seconds when either dies, and `--resume` ends in the bytes of one never stopped."""
    home = tmp_path / "home"
    often = ("train.iters=40", "train.save_every=3", "train.eval_every=10")
    train(home, *tiny_task(tmp_path, "whole", *often), processes=2)
    process = start(home, *tiny_task(tmp_path, "mine", *often), processes=2)
    until(lambda: len(metrics(home, "mine", "step", "step")) >= 8, process)
    os.kill(ranks_of(process)[killed], signal.SIGKILL)
    began = time.monotonic()
    out, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert "error: another process of this run has ended" in errors and "Traceback" not in errors
    assert f"rank {1 - killed} exited with code 1" in out + errors
    assert list((home / "runs" / "mine").glob("checkpoint-*"))
    refused = start(home, "--name", "mine", "--resume")
    _, errors = refused.communicate(timeout=60)
    assert refused.returncode == 1
    assert "was trained by 2 processes, and can't go on with one process" in errors and "mlx.launch -n 2" in errors
    train(home, "--name", "mine", "--resume", processes=2)
    assert weights(home, "mine") == weights(home, "whole")
    assert metrics(home, "mine", "step", "loss") == metrics(home, "whole", "step", "loss")
    tokens = [metrics(home, name, "finished", "computed_tokens") for name in ("mine", "whole")]
    assert tokens[0] == tokens[1], "each process counts on from its own number"


def test_one_whose_disk_fails_ends_all(tmp_path: Path) -> None:
    """An error in the middle of a run: its reason is said, the checkpoint from before stays."""
    home = tmp_path / "home"
    words = tiny_task(tmp_path, "mine", "train.iters=100000", "train.save_every=3")
    process = start(home, *words, processes=2)
    until(lambda: (home / "runs" / "mine" / "checkpoint-6").is_dir(), process)
    before = (home / "runs" / "mine" / "metrics.jsonl").rename(home / "moved")
    (home / "runs" / "mine" / "metrics.jsonl").mkdir()  # which can't be written to
    out, errors = process.communicate(timeout=60)
    assert "error: the run can't go on: " in errors and "Traceback" not in errors
    assert exit_codes(out + errors) == ["rank 0 exited with code 1", "rank 1 exited with code 1"]
    assert list((home / "runs" / "mine").glob("checkpoint-*")) and before.is_file()
