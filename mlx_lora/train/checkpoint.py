"""What a run needs to go on exactly where it was: read and written as one directory, whole or not at all.

    training.safetensors     adapter.*, optimizer.*, best.*: float32, as they are in memory; random: MLX's key
    training.json            counters, choices, what the run was made of, the other file's hash; written last

The order of rows is a pure function of (seed, epoch) and the learning rate one of the step, so a counter stands for
both. Training text is never part of it. Nothing here runs a model.
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_lora import paths, settings
from mlx_lora.data.batch import MOST_POSITIONS
from mlx_lora.data.read import sha256
from mlx_lora.errors import AdapterError, TrainingError
from mlx_lora.store.adapter import read_arrays
from mlx_lora.store.run import checkpoint_folders
from mlx_lora.train.budget.choose import Way
from mlx_lora.train.distributed import Processes
from mlx_lora.train.events import Checkpoint

WEIGHTS, STATE = "training.safetensors", "training.json"
# The last two stay: should the newest turn out unreadable, there is another.
KEPT = 2
LOSS_WINDOW = 10
# Counters that checkpoints of older versions don't have.
NEWER = {"too_large", "evaluations_over"}


@dataclass
class Progress:
    """Counters of a run, and what it chose by itself, which must not change on the way. `seconds` are of the loop.

    `too_large` is the way of running (recompute, most positions) that a run was stopped for: the next one is smaller.
    """

    step: int = 0
    trained_tokens: int = 0
    computed_tokens: int = 0
    real_tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=LOSS_WINDOW))
    valid_loss: float | None = None
    evaluated_at: int = 0
    best_loss: float | None = None
    evaluations_without_gain: int = 0
    evaluations_over: int = 0
    seconds: float = 0.0
    recomputes: bool | None = None
    most_positions: int | None = None
    keeps_prefix: bool | None = None
    too_large: list[Any] | None = None

    @classmethod
    def read(cls, values: dict[str, Any]) -> Progress:
        """The counters that `as_dict` gave. Raises TrainingError when they aren't those of this version."""
        if not {one.name for one in fields(cls)} - NEWER <= values.keys() <= {one.name for one in fields(cls)}:
            raise TrainingError("the checkpoint is of another version of mlx-lora", hint="start again with --force")
        recent = deque(((float(loss), int(tokens)) for loss, tokens in values["recent"]), maxlen=LOSS_WINDOW)
        return cls(**{**values, "recent": recent})

    @property
    def way(self) -> Way | None:
        """How the run is run; None where it hasn't begun, or has to be run in another way from here on."""
        return None if self.recomputes is None else Way(self.recomputes, self.most_positions or MOST_POSITIONS)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "recent": list(self.recent)}

    def count(self, loss: float, tokens: int, *, finite: bool) -> None:
        """One more step; a skipped one adds nothing to the training loss."""
        self.step += 1
        self.trained_tokens += tokens
        if finite:
            self.skipped_in_a_row = 0
            self.recent.append((loss, tokens))
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1

    @property
    def train_loss(self) -> float | None:
        """Token-weighted mean of the last steps."""
        tokens = sum(count for _, count in self.recent)
        return sum(loss for loss, _ in self.recent) / tokens if tokens else None


# What each of several processes has for itself, beside MLX's random key.
OWN = ("computed_tokens", "real_tokens", "recomputes", "keeps_prefix")
# Where a checkpoint of a group keeps that, a list by rank.
EACH = "processes"


def gathered(made: Checkpoint, group: Processes) -> Checkpoint:
    """A checkpoint that holds what every process of a group needs to go on; each calls this at the same step."""
    if group.size == 1:
        return made
    own = {name: made.progress[name] for name in OWN} | {"random": made.arrays["random"].tolist()}
    return replace(made, progress=made.progress | {EACH: group.gather(own)})


def for_each(made: Checkpoint | None, group: Processes) -> Checkpoint | None:
    """What `gathered` gave, from the first process to all, with each one's own part; the others pass None."""
    if group.size == 1:
        return made
    step, progress = group.gather((made.step, made.progress) if made else None)[0]
    arrays = group.arrays_of_first(made.arrays if made else {})
    own = progress.pop(EACH)[group.rank]
    return Checkpoint(step, arrays | {"random": mx.array(own.pop("random"), mx.uint32)}, progress | own)


@dataclass(frozen=True)
class Stored:
    """A checkpoint read back. `best` are the arrays with the lowest validation loss so far, none without any.

    `made_of` is what the run was made of, flat, by dotted key; `metrics_bytes` how much of metrics.jsonl was written.
    """

    checkpoint: Checkpoint
    best: dict[str, mx.array]
    made_of: dict[str, Any]
    metrics_bytes: int

    @property
    def progress(self) -> Progress:
        """The counters; of a group those of the first process, without what the others have for themselves."""
        return Progress.read({key: value for key, value in self.checkpoint.progress.items() if key != EACH})

    def differences(self, made_of: dict[str, Any], *, ignored: Collection[str] = ()) -> list[str]:
        """What differs between the run as it was and as it would go on, one line a key.

        A setting that an older version of this program didn't know had its default.
        """
        keys = sorted((self.made_of.keys() | made_of.keys()).difference(ignored))
        known = {
            f"recipe.{key}": field.get_default(call_default_factory=True) for key, field in settings.fields().items()
        }
        pairs = ((key, self.made_of.get(key, known.get(key)), made_of.get(key)) for key in keys)
        return [f"{key} was {then!r}, is {now!r}" for key, then, now in pairs if then != now]


def write(
    run: Path, checkpoint: Checkpoint, *, best: dict[str, mx.array], made_of: dict[str, Any], metrics_bytes: int
) -> Path:
    """Write `run`/checkpoint-<step>, then remove all but the last KEPT."""
    target = run / f"checkpoint-{checkpoint.step}"
    with paths.written_whole(target, force=True) as folder:
        arrays = {**checkpoint.arrays, **{f"best.{name}": array for name, array in best.items()}}
        with paths.created(folder / WEIGHTS) as stream:
            mx.save_safetensors(stream, arrays)
        state = {
            "step": checkpoint.step,
            "progress": checkpoint.progress,
            "made_of": made_of,
            "metrics_bytes": metrics_bytes,
            "sha256": sha256(folder / WEIGHTS),
        }
        with paths.created(folder / STATE) as stream:
            stream.write(json.dumps(state, indent=1).encode())
    for old in checkpoint_folders(run)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def newest(run: Path) -> Stored:
    """The newest checkpoint that can be read. Raises TrainingError when there is none."""
    faults = []
    for folder in reversed(checkpoint_folders(run)):
        try:
            return _read(folder)
        except (AdapterError, OSError, ValueError, KeyError, TypeError) as error:
            faults.append(f"{folder}: {error}")
    if faults:
        raise TrainingError("no checkpoint can be read:\n  " + "\n  ".join(faults), hint="start again with --force")
    raise TrainingError(f"{run} holds no checkpoint to go on from", hint="train without --resume")


def _read(folder: Path) -> Stored:
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if sha256(folder / WEIGHTS) != state["sha256"]:
        raise ValueError(f"{WEIGHTS} is not the file that was written")
    arrays = read_arrays(folder / WEIGHTS)
    mx.eval(arrays)  # read lazily otherwise, from a file that may be gone by then
    best = {name.removeprefix("best."): array for name, array in arrays.items() if name.startswith("best.")}
    kept = {name: array for name, array in arrays.items() if not name.startswith("best.")}
    made = Checkpoint(int(state["step"]), kept, state["progress"])
    return Stored(made, best, state["made_of"], int(state["metrics_bytes"]))
