"""A training run on disk: what is kept while it goes on, and what stays of it.

    runs/<name>/recipe.yaml           the recipe as it was run
    runs/<name>/metrics.jsonl         a line for each step and evaluation
    runs/<name>/checkpoint-<step>/    the last two, until the run is done (see `train.checkpoint`)
    runs/<name>/last/                 the last adapter
    adapters/<name>/                  the best adapter by validation loss, or the last without validation rows

It listens to the trainer's events and never sees the training text. One process at a time may hold a run.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import yaml

from mlx_lora import paths, ui
from mlx_lora.adapters.attach import Wrappers
from mlx_lora.config import Recipe
from mlx_lora.errors import TrainingError
from mlx_lora.store import adapter as store
from mlx_lora.train import checkpoint
from mlx_lora.train.events import Checkpoint, Evaluated, Event, Finished, Saved, Step

# Arrays of the adapter's size in a checkpoint: the adapter, two of the optimizer, two of AdaLoRA's, the best one.
ARRAYS = 6


def _anywhere(name: str) -> str:
    """A path as it is found from any directory; anything else as it is."""
    found = paths.existing(name)
    return str(found.absolute()) if found else name


class RunFolder:
    """Listens to the events and keeps what should outlive the process, if it `writes`; `made_of` identifies the run."""

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        manifest: store.Manifest,
        wrappers: Wrappers,
        layers: int,
        *,
        made_of: dict[str, Any],
        writes: bool,
    ):
        self.manifest, self.wrappers, self.layers, self.name, self.writes = manifest, wrappers, layers, name, writes
        self.made_of, self.recipe = made_of, recipe
        self.best: dict[str, mx.array] | None = None
        self.last: dict[str, mx.array] = {}
        self.finished: Finished | None = None
        self.folder = paths.room("runs", name)
        self.metrics = self.folder / "metrics.jsonl"

    def begin(self) -> None:
        """Make the folder anew. Raises MlxLoraError where the disk has no room for what the run will write."""
        if not self.writes:
            return
        self._check_space()
        if self.folder.exists():
            shutil.rmtree(self.folder)
        for folder in (self.folder.parent, self.folder):
            folder.mkdir(mode=0o700, exist_ok=True)
        values = self.recipe.model_dump()
        values["model"], values["data"]["path"] = map(_anywhere, (values["model"], values["data"]["path"]))
        with paths.created(self.folder / "recipe.yaml") as stream:
            stream.write(yaml.safe_dump(values, sort_keys=False).encode())

    def go_on(self, *, force: bool) -> Checkpoint:
        """The newest checkpoint, with the metrics cut to it. Raises TrainingError naming what the run differs in."""
        stored = checkpoint.newest(self.folder)
        differences = stored.differences(self.made_of)
        if differences and not force:
            raise TrainingError(
                f"run {self.name!r} can't go on as it was:\n  " + "\n  ".join(differences),
                hint="train with the recipe, base and data it began with, or --force to go on all the same",
            )
        self._check_space()
        self.best = stored.best or None
        if self.metrics.is_file():
            with open(self.metrics, "r+b") as stream:
                stream.truncate(min(stored.metrics_bytes, self.metrics.stat().st_size))
        return stored.checkpoint

    def _check_space(self) -> None:
        adapter = sum(array.nbytes for wrapper in self.wrappers.values() for array in wrapper.adapter_arrays().values())
        paths.check_space(paths.home(), adapter * ARRAYS * (checkpoint.KEPT + 1))

    def hear(self, event: Event) -> None:
        """Keep what an event brings."""
        if isinstance(event, Saved):
            if event.kind == "best":
                self.best = event.arrays
            else:
                self.last = event.arrays
        elif isinstance(event, Checkpoint):
            self._save_checkpoint(event)
        elif isinstance(event, Step | Evaluated | Finished):
            if isinstance(event, Finished):
                self.finished = event
            self._record({"event": type(event).__name__.lower(), **asdict(event)})

    def _record(self, line: dict[str, Any]) -> None:
        if self.writes:
            with paths.created(self.metrics, "ab") as stream:
                stream.write((ui.json_text(line) + "\n").encode())

    def _save_checkpoint(self, event: Checkpoint) -> None:
        if self.writes:
            checkpoint.write(
                self.folder,
                event,
                best=self.best or {},
                made_of=self.made_of,
                metrics_bytes=self.metrics.stat().st_size if self.metrics.is_file() else 0,
            )

    def forget(self) -> None:
        """Leave nothing of a run that learned nothing."""
        if self.writes and not checkpoint.checkpoints(self.folder):
            shutil.rmtree(self.folder)

    def save(self, *, force: bool) -> Path:
        """The best adapter under its name, the last one in the run; the model is left with what was stored.

        Checkpoints stay of a run that can go on: one that was stopped.
        """
        assert self.finished is not None
        metrics = asdict(self.finished)
        self._write(self.folder / "last", self.last, metrics, force=True)
        chosen = self.last if self.best is None else self.best
        path = self._write(paths.room("adapters", self.name), chosen, metrics, force=force)
        if self.writes and self.finished.stopped_by not in ("interrupted", "memory"):
            for folder in checkpoint.checkpoints(self.folder):
                shutil.rmtree(folder)
        return path

    def _write(self, out: Path, arrays: dict[str, mx.array], metrics: dict[str, Any], *, force: bool) -> Path:
        for path, wrapper in self.wrappers.items():
            for name in wrapper.adapter_params():
                wrapper[name] = arrays[f"{path}.{name}"]
        if not self.writes:
            return out
        manifest = self.manifest.model_copy(update={"metrics": metrics})
        return store.save(out, self.wrappers, manifest, self.layers, force=force)
