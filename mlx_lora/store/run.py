"""What a training run leaves in its folder, and how it is read back.

    recipe.yaml           the recipe as it was run
    metrics.jsonl         one JSON object a line, of which `event` says the kind: the classes below
    checkpoint-<step>/    what `train --resume` goes on from
    last/                 the last adapter

Training text is never part of it. Folders of older versions read as well. Nothing here imports MLX: listing is quick.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mlx_lora import files, paths
from mlx_lora.config import Recipe
from mlx_lora.errors import MlxLoraError, nearest
from mlx_lora.recipe import load_recipe
from mlx_lora.store.lock import is_locked, locked

RECIPE, METRICS, LAST = "recipe.yaml", "metrics.jsonl", "last"
State = Literal["finished", "unfinished", "abandoned", "running", "damaged"]
# Ends of a run that can go on: the others are final.
CAN_GO_ON = ("interrupted", "memory")


class Line(BaseModel):
    """A line of metrics.jsonl. Keys that this version doesn't know are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Started(Line):
    """The first line of a run: when, by which version, and whether an adapter of its name is there to be replaced.
    Rows that it trains and validates on, predicted bytes and their limit are None where that wasn't known."""

    event: Literal["started"] = "started"
    time: str
    mlx_lora: str
    replaces: bool = False
    rows: int | None = None
    valid_rows: int | None = None
    predicted_memory_bytes: int | None = None
    memory_limit_bytes: int | None = None


class Resumed(Line):
    """The run went on, after `step` steps; `replaces` as in Started."""

    event: Literal["resumed"] = "resumed"
    time: str
    mlx_lora: str
    step: int
    replaces: bool = False


class StepLine(Line):
    """One optimizer step; `loss` is null where it was not finite."""

    event: Literal["step"] = "step"
    step: int
    steps: int
    loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    tokens: int = 0
    tokens_per_second: float | None = None
    peak_memory: int = 0
    skipped: bool = False


class Evaluation(Line):
    """Validation loss after `step` steps; `drift`, KL from the base in nats, where the recipe has a max_drift."""

    event: Literal["evaluated"] = "evaluated"
    step: int
    loss: float | None = None
    best: bool = False
    drift: float | None = None


class NoteLine(Line):
    """Something that training chose by itself, and why."""

    event: Literal["note"] = "note"
    text: str


class FinishedLine(Line):
    """The last line of a run, with the figures of `train --json`; written once the adapter is stored."""

    event: Literal["finished"] = "finished"
    iters: int
    epochs: float = 0.0
    train_loss: float | None = None
    valid_loss: float | None = None
    best_valid_loss: float | None = None
    trained_tokens: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    stopped_by: str


KINDS: dict[str, type[Line]] = {
    kind.model_fields["event"].default: kind
    for kind in (Started, Resumed, StepLine, Evaluation, NoteLine, FinishedLine)
}


class RunRecord(BaseModel):
    """A run as its folder tells it. `recipe` is None where it can't be read; `checkpoints` are steps, oldest first."""

    name: str
    path: Path
    state: State
    recipe: Recipe | None = None
    started: str | None = None
    first: Started | None = None
    replaces: bool = False
    steps: list[StepLine] = []
    evaluations: list[Evaluation] = []
    notes: list[str] = []
    finished: FinishedLine | None = None
    checkpoints: list[int] = []
    fault: str | None = None

    @property
    def step(self) -> int:
        """Steps done, of which a killed run's last ones may have to be done again."""
        return self.steps[-1].step if self.steps else self.finished.iters if self.finished else 0

    @property
    def planned_steps(self) -> int | None:
        return self.steps[-1].steps if self.steps else None

    @property
    def stopped_by(self) -> str | None:
        return self.finished.stopped_by if self.finished else None

    @property
    def train_loss(self) -> float | None:
        """The mean over the last steps, or the last step's where the run hasn't come to an end."""
        return self.finished.train_loss if self.finished else self.steps[-1].loss if self.steps else None

    @property
    def kept(self) -> Evaluation | None:
        """The validation whose adapter is kept; None where that is the last step's, since none was within max_drift."""
        return next((line for line in reversed(self.evaluations) if line.best and line.loss is not None), None)

    @property
    def best_valid_loss(self) -> float | None:
        return self.kept.loss if self.kept else None

    def summary(self) -> dict[str, Any]:
        """One entry of `runs list --json`."""
        return {
            "name": self.name,
            "state": self.state,
            "step": self.step,
            "steps": self.planned_steps,
            "train_loss": self.train_loss,
            "best_valid_loss": self.best_valid_loss,
            "stopped_by": self.stopped_by,
            "started": self.started,
            "checkpoints": self.checkpoints,
            "bytes": paths.directory_bytes(self.path),
        }


def checkpoint_folders(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    numbers = {path: path.name.removeprefix("checkpoint-") for path in run.glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path, number in numbers.items() if number.isdecimal()), key=lambda path: int(numbers[path]))


def names() -> list[str]:
    """Names of the runs in the home; a link that leads out of it is none."""
    root = paths.home() / "runs"
    found = [path for path in root.glob("*") if path.is_dir() and paths.is_name(path.name)]
    return sorted(path.name for path in found if files.inside(path, root))


def find(name: str) -> Path:
    """The folder of the run called `name`. Raises MlxLoraError naming the closest one there is."""
    path = paths.room("runs", name)
    if not path.is_dir():
        closest = nearest(name, known) if (known := names()) else "; there are none yet"
        raise MlxLoraError(f"no run {name!r}{closest}", hint="mlx-lora runs list")
    return path


def list_runs() -> list[RunRecord]:
    """All runs of the home, by name; one whose record can't be read has the state `damaged`."""
    return [_with_lock(read_folder_or_damaged(find(name))) for name in names()]


def read(name: str) -> RunRecord:
    """The record of the run called `name`. Raises MlxLoraError where there is none, or it is damaged."""
    return _with_lock(read_folder(find(name)))


def _with_lock(record: RunRecord) -> RunRecord:
    return record.model_copy(update={"state": "running"}) if is_locked(record.name) else record


def read_folder_or_damaged(folder: Path) -> RunRecord:
    """The record in a run's folder; of a damaged one its name, its checkpoints and what is wrong."""
    try:
        return read_folder(folder)
    except MlxLoraError as error:
        left = _steps(folder)
        return RunRecord(name=folder.name, path=folder, state="damaged", checkpoints=left, fault=error.message)


def _steps(folder: Path) -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in checkpoint_folders(folder)]


def read_folder(folder: Path) -> RunRecord:
    """The record in a run's folder, whoever is writing it. Raises MlxLoraError for a damaged one."""
    lines = list(_lines(folder / METRICS))
    begun = [line for line in lines if isinstance(line, Started | Resumed)]
    ended = [position for position, line in enumerate(lines) if isinstance(line, FinishedLine)]
    # a run that went on after it had ended is not at its end
    finished = lines[ended[-1]] if ended and not any(isinstance(line, Resumed) for line in lines[ended[-1] :]) else None
    assert finished is None or isinstance(finished, FinishedLine)
    checkpoints = _steps(folder)
    return RunRecord(
        name=folder.name,
        path=folder,
        state=_state(folder, finished, checkpoints),
        recipe=_recipe(folder / RECIPE),
        started=begun[0].time if begun else None,
        first=next((line for line in begun if isinstance(line, Started)), None),
        replaces=begun[-1].replaces if begun else False,
        steps=[line for line in lines if isinstance(line, StepLine)],
        evaluations=[line for line in lines if isinstance(line, Evaluation)],
        notes=[line.text for line in lines if isinstance(line, NoteLine)],
        finished=finished,
        checkpoints=checkpoints,
    )


def _state(folder: Path, finished: FinishedLine | None, checkpoints: list[int]) -> State:
    if finished and finished.stopped_by not in CAN_GO_ON:
        # older versions wrote this line before they stored the adapter, and may have been killed in between
        stored = (paths.home() / "adapters" / folder.name).is_dir()
        return "finished" if stored or not checkpoints else "unfinished"
    return "unfinished" if checkpoints else "abandoned"


def _lines(file: Path) -> Iterator[Line]:
    """The lines of metrics.jsonl; a last one without its end was being written when the process died."""
    if not file.is_file():
        return
    whole, _, _ = files.read_text(file, MlxLoraError, most=files.LARGE).rpartition("\n")
    for number, text in enumerate(filter(None, whole.split("\n")), 1):
        try:
            values = json.loads(text)
            kind = KINDS.get(values["event"])
            if kind is not None:
                yield kind.model_validate(values)
        except (ValueError, LookupError, TypeError, RecursionError, ValidationError):
            raise MlxLoraError(f"{file}:{number}: not a line of a run's record") from None


def _recipe(file: Path) -> Recipe | None:
    try:
        return load_recipe(file) if file.is_file() else None
    except MlxLoraError:  # of another version: the figures are still worth showing
        return None


def remove(name: str) -> int:
    """Delete the run called `name`, not its adapter; return the bytes freed.

    Raises MlxLoraError for a name that isn't there, and NameTaken while it is in training.
    """
    with locked(name):
        path = find(name)
        if path.is_symlink():  # the link is what has this name; what it leads to has another
            path.unlink()
            return 0
        freed = paths.directory_bytes(path)
        shutil.rmtree(path)
        return freed
