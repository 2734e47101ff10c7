"""What runs leave in the home: lines of every version, torn ones, states, and removal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_lora import paths
from mlx_lora.errors import MlxLoraError, NameTaken
from mlx_lora.report.compare import figures
from mlx_lora.store import run as runs
from mlx_lora.store.run import METRICS, Evaluation, FinishedLine, RunRecord, Started, StepLine

STARTED = Started(time="2026-11-01T10:00:00+00:00", mlx_lora="0.1")
STEPS = [StepLine(step=number, steps=4, loss=5.0 - number) for number in (1, 2, 3)]
# As versions before run records wrote them.
OLD = [
    {"event": "evaluated", "step": 0, "loss": 5.0, "best": False},
    {"event": "step", "step": 1, "steps": 2, "loss": 4.0, "learning_rate": 1e-4, "gradient_norm": 1.0, "tokens": 9,
     "tokens_per_second": 3.0, "peak_memory": 7, "skipped": False},
    {"event": "step", "step": 2, "steps": 2, "loss": None, "learning_rate": 1e-4, "gradient_norm": None, "tokens": 9,
     "tokens_per_second": 3.0, "peak_memory": 7, "skipped": True},
    {"event": "finished", "iters": 2, "epochs": 1.0, "train_loss": 4.0, "valid_loss": None, "best_valid_loss": None,
     "trained_tokens": 18, "computed_tokens": 20, "padding_fraction": 0.1, "seconds": 3.5, "tokens_per_second": 5.1,
     "peak_memory_bytes": 7, "largest_micro_batch": 9, "trainable_parameters": 3, "skipped_steps": 1,
     "stopped_by": "epochs"},
]  # fmt: skip


def write(name: str, *lines: Any, end: str = "", checkpoints: tuple[int, ...] = (), adapter: bool = False) -> Path:
    """A run's folder with these lines; `end` is what follows them."""
    folder = paths.home() / "runs" / name
    folder.mkdir(parents=True)
    values = [line if isinstance(line, dict) else line.model_dump() for line in lines]
    (folder / METRICS).write_text("".join(json.dumps(value) + "\n" for value in values) + end)
    for step in checkpoints:
        (folder / f"checkpoint-{step}").mkdir()
    if adapter:
        (paths.home() / "adapters" / name).mkdir(parents=True)
    return folder


def test_records_of_older_versions_read(home: Path) -> None:
    write("old", *OLD, adapter=True)
    record = runs.read("old")
    assert (record.state, record.step, record.planned_steps, record.stopped_by) == ("finished", 2, 2, "epochs")
    assert [line.loss for line in record.steps] == [4.0, None] and record.steps[1].skipped
    assert record.started is None and record.finished and record.finished.seconds == 3.5


@pytest.mark.parametrize("torn", ['{"event": "step", "st', '{"event": "step"', "\x00" * 5])
def test_a_torn_last_line_is_left_out(home: Path, torn: str) -> None:
    write("mine", STARTED, *STEPS, end=torn, checkpoints=(2,))
    record = runs.read("mine")
    assert record.step == 3 and record.state == "unfinished"


def test_a_damaged_line_before_the_end_is_named_and_hides_no_other_run(home: Path) -> None:
    write("bad", STARTED, {"event": "step", "step": "many"}, *STEPS, checkpoints=(2,))
    write("good", STARTED, *STEPS)
    with pytest.raises(MlxLoraError, match=r"metrics.jsonl:2: not a line"):
        runs.read("bad")
    assert [(record.name, record.state) for record in runs.list_runs()] == [("bad", "damaged"), ("good", "abandoned")]


def test_lines_of_later_versions_are_left_out(home: Path) -> None:
    write("mine", STARTED, {"event": "weather", "sun": True}, StepLine(step=1, steps=2).model_dump() | {"new": 1})
    assert runs.read("mine").step == 1


ENDED = FinishedLine(iters=3, stopped_by="epochs")
STOPPED = FinishedLine(iters=3, stopped_by="interrupted")
STATES: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "done": ([*STEPS, ENDED], {"adapter": True}, "finished"),
    "done, may train on": ([*STEPS, ENDED], {"adapter": True, "checkpoints": (3,)}, "finished"),
    "killed before its adapter was stored": ([*STEPS, ENDED], {"checkpoints": (2,)}, "unfinished"),
    "interrupted": ([*STEPS, STOPPED], {"adapter": True, "checkpoints": (3,)}, "unfinished"),
    "killed with a checkpoint": ([*STEPS], {"checkpoints": (2,)}, "unfinished"),
    "killed before one": ([*STEPS], {}, "abandoned"),
    "trained on": (
        [*STEPS, ENDED, runs.Resumed(time="", mlx_lora="", step=3)], {"adapter": True, "checkpoints": (3,)},
        "unfinished",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STATES)
def test_the_state_of_a_run(home: Path, case: str) -> None:
    lines, more, state = STATES[case]
    write("mine", STARTED, *lines, **more)
    assert runs.read("mine").state == state


def test_a_folder_with_nothing_in_it_is_abandoned_and_can_be_removed(home: Path) -> None:
    """What a run leaves that was killed before its first checkpoint."""
    (home / "runs" / "mine").mkdir(parents=True)
    assert runs.read("mine").state == "abandoned"
    runs.remove("mine")
    assert runs.names() == []


def test_a_name_that_is_not_there_names_the_nearest(home: Path) -> None:
    write("notes", STARTED)
    for use in (runs.find, runs.read, runs.remove):
        with pytest.raises(MlxLoraError, match="no run 'note'; did you mean 'notes'?"):
            use("note")


def test_a_run_in_training_is_running_and_not_removed(home: Path) -> None:
    write("mine", STARTED, *STEPS, checkpoints=(2,))
    code = """if True:
        import time
        from mlx_lora.store.lock import locked
        with locked("mine"):
            print(1, flush=True)
            time.sleep(99)
    """
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "1\n"
    try:
        assert runs.read("mine").state == "running"
        with pytest.raises(NameTaken):
            runs.remove("mine")
    finally:
        other.kill()
        other.communicate()
    assert runs.read("mine").state == "unfinished"


def test_the_best_loss_is_never_the_untrained_one(home: Path) -> None:
    losses = {0: 1.0, 2: 3.0, 4: 2.0}
    write("mine", STARTED, *(Evaluation(step=step, loss=loss, best=step > 0) for step, loss in losses.items()))
    record: RunRecord = runs.read("mine")
    assert record.best_valid_loss == 2.0


def test_the_best_loss_is_that_of_the_adapter_that_is_kept(home: Path) -> None:
    """Over train.max_drift a lower loss isn't the best: see `train.trainer`."""
    lines = [Evaluation(step=2, loss=3.0, best=True, drift=0.1), Evaluation(step=4, loss=2.0, drift=0.9)]
    write("mine", STARTED, *lines)
    assert runs.read("mine").best_valid_loss == 3.0 and figures(runs.read("mine"))["best_step"] == 2
