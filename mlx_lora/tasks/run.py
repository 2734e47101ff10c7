"""A training run on disk: what is kept while it goes on, and what stays of it (see `store.run`).

It is given the trainer's events and never sees the training text. The adapter in the home is the best one by
validation loss, or the last one without validation rows; the run's own folder holds the last one.

A run that replaces another (`--force`) is written to a folder without a name, which takes the old run's place with its
first checkpoint. The adapter that is there already stays until the new run has finished: one that was stopped keeps its
checkpoint alone. So a process may die at any moment, and nothing that was finished is lost.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlx.core as mx
import yaml

from mlx_lora import __version__, paths, ui
from mlx_lora.adapters.attach import Wrappers
from mlx_lora.config import TEMPLATE_FILE, Recipe
from mlx_lora.store import adapter as store
from mlx_lora.store.run import (
    CAN_GO_ON,
    LAST,
    METRICS,
    RECIPE,
    Resumed,
    RunRecord,
    Started,
    checkpoint_folders,
)
from mlx_lora.train import checkpoint
from mlx_lora.train.events import Checkpoint, Evaluated, Event, Finished, Note, Saved, Step

# Arrays of the adapter's size in a checkpoint: the adapter, two of the optimizer, two of AdaLoRA's, the best one.
ARRAYS = 6
# How a run ended that is no better than the adapter it was to replace.
INCOMPLETE = (*CAN_GO_ON, "nonfinite")


class RunFolder:
    """Keeps of the events what should outlive the process, if it `writes`; `made_of` identifies the run.

    `known` are figures for the run's first line: see `store.run.Started`.
    """

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
        chat_template: str | None = None,
        known: dict[str, int | None] | None = None,
    ):
        self.manifest, self.wrappers, self.layers, self.name, self.writes = manifest, wrappers, layers, name, writes
        self.made_of, self.recipe, self.chat_template, self.known = made_of, recipe, chat_template, known or {}
        self.best: dict[str, mx.array] | None = None
        self.last: dict[str, mx.array] = {}
        self.finished: Finished | None = None
        self.home, self.adapter = paths.room("runs", name), paths.room("adapters", name)
        self.folder = self.home  # or where a run that replaces another is until it has a checkpoint
        self.replaces = False

    @property
    def metrics(self) -> Path:
        return self.folder / METRICS

    @property
    def kept_old_adapter(self) -> bool:
        """Whether the adapter of this name stays as it was, because this run hasn't finished."""
        assert self.finished is not None
        return self.replaces and self.adapter.exists() and self.finished.stopped_by in INCOMPLETE

    def begin(self) -> None:
        """Make the folder. Raises MlxLoraError where the disk has no room for what the run will write."""
        if not self.writes:
            return
        self._check_space()
        self.replaces = self.adapter.exists()
        self.home.parent.mkdir(mode=0o700, exist_ok=True)
        if os.path.lexists(self.home):
            self.folder = Path(tempfile.mkdtemp(prefix=f".{self.name}.", dir=self.home.parent))
        else:
            self.folder.mkdir(mode=0o700)
        self._write_recipe()
        started = Started(time=_now(), mlx_lora=__version__, replaces=self.replaces)
        self._record(started.model_dump() | self.known)

    def go_on(self, stored: checkpoint.Stored, record: RunRecord) -> Checkpoint:
        """The checkpoint to go on from, with the metrics cut to it and the recipe as it is now."""
        self._check_space()
        self.best = stored.best or None
        self.replaces = record.replaces or record.state == "finished"
        if self.metrics.is_file():
            with open(self.metrics, "r+b") as stream:
                stream.truncate(min(stored.metrics_bytes, self.metrics.stat().st_size))
        self._write_recipe()
        step = stored.checkpoint.step
        self._record(Resumed(time=_now(), mlx_lora=__version__, step=step, replaces=self.replaces).model_dump())
        return stored.checkpoint

    def _write_recipe(self) -> None:
        values = self.recipe.model_dump()
        values["model"], values["data"]["path"] = map(_from_anywhere, (values["model"], values["data"]["path"]))
        if values["data"]["template"].endswith(TEMPLATE_FILE):
            values["data"]["template"] = _from_anywhere(values["data"]["template"])
        complete, temporary = self.folder / RECIPE, self.folder / f"{RECIPE}.new"
        with paths.created(temporary) as stream:
            stream.write(yaml.safe_dump(values, sort_keys=False).encode())
        temporary.replace(complete)

    def _check_space(self) -> None:
        adapter = sum(array.nbytes for wrapper in self.wrappers.values() for array in wrapper.adapter_arrays().values())
        paths.check_space(paths.home(), adapter * ARRAYS * (checkpoint.KEPT + 1))

    def keep(self, event: Event) -> None:
        """Keep what an event brings. How the run finished is recorded once its adapter is stored."""
        if isinstance(event, Saved):
            if event.kind == "best":
                self.best = event.arrays
            else:
                self.last = event.arrays
        elif isinstance(event, Checkpoint):
            self._save_checkpoint(event)
        elif isinstance(event, Finished):
            self.finished = event
        elif isinstance(event, Step | Evaluated | Note):
            self._record({"event": type(event).__name__.lower(), **asdict(event)})

    def _record(self, line: dict[str, Any]) -> None:
        if self.writes:
            with paths.created(self.metrics, "ab") as stream:
                stream.write((ui.json_text(line) + "\n").encode())

    def _save_checkpoint(self, event: Checkpoint) -> None:
        if not self.writes:
            return
        checkpoint.write(
            self.folder,
            event,
            best=self.best or {},
            made_of=self.made_of,
            metrics_bytes=self.metrics.stat().st_size if self.metrics.is_file() else 0,
        )
        self._take_place()

    def _take_place(self) -> None:
        """Give the new run the old one's place."""
        if self.folder != self.home:
            paths.replace_directory(self.folder, self.home)
            paths.synchronize(self.home.parent)
            self.folder = self.home

    def discard(self) -> None:
        """Leave nothing of a run that learned nothing; the one that it was to replace stays."""
        if self.writes and not checkpoint_folders(self.folder):
            shutil.rmtree(self.folder)

    def save(self, *, force: bool) -> Path:
        """Store the adapter and return its path: under its name, or in the run where the old adapter was kept.

        The model is left with what was stored. Checkpoints stay of a run that can go on: of one that was stopped, and
        the last one where the learning rate doesn't depend on the number of steps.
        """
        assert self.finished is not None
        metrics, path = asdict(self.finished), self.adapter
        self._write(self.folder / LAST, self.last, metrics, force=True)
        if self.kept_old_adapter:
            path = self.home / LAST
        else:
            self._write(path, self.last if self.best is None else self.best, metrics, force=force)
        self._record({"event": "finished", **metrics})
        if self.writes:
            self._take_place()
            self._remove_checkpoints()
        return path

    def _remove_checkpoints(self) -> None:
        assert self.finished is not None
        folders = checkpoint_folders(self.folder)
        if self.finished.stopped_by in CAN_GO_ON:
            return
        if self.recipe.train.schedule == "constant" and self.finished.stopped_by != "nonfinite":
            folders = [folder for folder in folders if folder.name != f"checkpoint-{self.finished.iters}"]
        for folder in folders:
            shutil.rmtree(folder)

    def _write(self, out: Path, arrays: dict[str, mx.array], metrics: dict[str, Any], *, force: bool) -> None:
        for path, wrapper in self.wrappers.items():
            for name in wrapper.adapter_params():
                wrapper[name] = arrays[f"{path}.{name}"]
        if self.writes:
            manifest = self.manifest.model_copy(update={"metrics": metrics})
            store.save(out, self.wrappers, manifest, self.layers, chat_template=self.chat_template, force=force)


def _from_anywhere(name: str) -> str:
    """A path as it is found from any directory; anything else as it is."""
    found = paths.existing(name)
    return str(found.absolute()) if found else name


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
