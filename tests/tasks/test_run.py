"""A run on disk: faults at every write, rename and fsync, two runs of one name, changed recipes, and what stays."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_lora import paths
from mlx_lora.config import Recipe
from mlx_lora.errors import MlxLoraError, NameTaken, TrainingError
from mlx_lora.store import adapter as store
from mlx_lora.store import registry
from mlx_lora.store import run as runs
from mlx_lora.store.lock import locked
from mlx_lora.store.run import checkpoint_folders
from mlx_lora.tasks.train import Listener, TrainedRun, train_adapter
from mlx_lora.train import checkpoint
from mlx_lora.train.events import Step


@pytest.fixture
def recipe(tiny_path: Path, write_rows: Callable[..., Path]) -> Recipe:
    rows = [{"prompt": f"{number} + 1 =", "completion": str(number + 1)} for number in range(12)]
    write_rows(rows[:4], name="valid.jsonl")
    folder = write_rows(rows).parent
    settings = {"iters": 4, "batch_size": 4, "save_every": 1, "eval_every": 2, "learning_rate": 1e-2,
                "epochs": 1, "patience": None}  # fmt: skip
    return Recipe.model_validate(
        {"model": str(tiny_path), "name": "mine", "data": {"path": str(folder)}, "adapter": {"rank": 4, "dropout": 0.1},
         "train": settings}
    )  # fmt: skip


def weights(name: str = "mine") -> bytes:
    return (registry.find(name) / store.WEIGHTS).read_bytes()


class Stopped(Exception):
    """Stands for the end of the process."""


def stop_after(step: int) -> Listener:
    def hear(event: Any) -> None:
        if isinstance(event, Step) and event.step == step:
            raise Stopped

    return Listener(event=hear)


def interrupted(recipe: Recipe, step: int = 3) -> None:
    """A run that ended in the middle of `step`, as if the process had died."""
    with pytest.raises(Stopped):
        train_adapter(recipe, listener=stop_after(step))


class Failing:
    """A stream whose writes may fail."""

    def __init__(self, stream: Any, count: Callable[[], None]):
        self._stream, self._count = stream, count

    def write(self, data: Any) -> Any:
        self._count()
        return self._stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> Failing:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stream.close()


@contextmanager
def failing(number: int, code: int, home: Path) -> Iterator[list[int]]:
    """Let the `number`th write, rename, fsync or new directory below `home` raise; yields how many there were."""
    counted = [0]

    def count() -> None:
        counted[0] += 1
        if counted[0] == number:
            raise OSError(code, os.strerror(code))

    def counting(original: Any, counts: Callable[..., bool]) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            if counts(*arguments, **named):
                count()
            return original(*arguments, **named)

        return call

    def opening(original: Any) -> Any:
        def call(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
            stream = original(file, mode, *arguments, **named)
            below = isinstance(file, str | Path) and Path(file).absolute().is_relative_to(home)
            return Failing(stream, count) if below and set(mode) & set("wa+x") else stream

        return call

    below = lambda path, *_, **__: Path(path).is_relative_to(home)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", opening(builtins.open))
        patch.setattr(io, "open", builtins.open)
        patch.setattr(os, "fsync", counting(os.fsync, lambda descriptor: True))
        for name in ("rename", "replace", "mkdir"):
            patch.setattr(os, name, counting(getattr(os, name), below))
        yield counted


def check_what_is_there(before: bytes, after: bytes) -> None:
    """The old adapter or the new one under its name, nothing partial listed, every checkpoint whole."""
    assert registry.names() == ["mine"]
    assert weights() in (before, after)
    store.read(registry.find("mine"))
    for folder in checkpoint_folders(paths.room("runs", "mine")):
        checkpoint._read(folder)


def inject(recipe: Recipe, home: Path, numbers: Iterator[int]) -> int:
    """Replace an adapter with faults at each of `numbers`, until none is reached; the number of operations."""
    short = recipe.train.model_copy(update={"iters": 3, "save_every": 2, "eval_every": None})
    recipe = recipe.model_copy(update={"train": short})
    changed = recipe.model_copy(update={"seed": 1})
    train_adapter(changed)
    after = weights()
    train_adapter(recipe, force=True)
    before, kept = weights(), home.with_name("kept")
    assert before != after
    shutil.copytree(home, kept)
    for number in numbers:
        shutil.rmtree(home)
        shutil.copytree(kept, home)
        with failing(number, (errno.ENOSPC, errno.EIO)[number % 2], home) as counted:
            try:
                train_adapter(changed, force=True)
            except TrainingError as error:
                assert os.strerror((errno.ENOSPC, errno.EIO)[number % 2]) in error.message
        if counted[0] < number:
            assert weights() == after
            return counted[0]
        check_what_is_there(before, after)
        finish(changed, after)
    raise AssertionError("there were more operations than numbers")


def finish(recipe: Recipe, expected: bytes) -> None:
    """Go on where a checkpoint was reached: the same bytes in the end."""
    if checkpoint_folders(paths.room("runs", "mine")):
        train_adapter(recipe, resume=True)
        assert weights() == expected


@pytest.mark.real
def test_a_fault_leaves_what_was_there(recipe: Recipe, home: Path) -> None:
    inject(recipe, home, iter(range(5, 1000, 13)))


@pytest.mark.real
def test_a_fault_at_every_operation_leaves_what_was_there(recipe: Recipe, home: Path) -> None:
    operations = inject(recipe, home, iter(range(1, 1000)))
    assert operations > 40


def test_a_run_that_died_goes_on_to_the_same_bytes(recipe: Recipe) -> None:
    whole = train_adapter(recipe.model_copy(update={"name": "whole"}))
    interrupted(recipe)
    folder = paths.room("runs", "mine")
    assert [path.name for path in checkpoint_folders(folder)] == ["checkpoint-1", "checkpoint-2"]
    went_on = train_adapter(recipe, resume=True)
    assert weights() == weights("whole")
    kept = {"iters", "epochs", "train_loss", "valid_loss", "best_valid_loss", "trained_tokens", "computed_tokens"}
    assert all(went_on.as_dict()[key] == whole.as_dict()[key] for key in kept)
    assert [line["step"] for line in metrics(went_on) if line["event"] == "step"] == [1, 2, 3, 4]
    assert not checkpoint_folders(folder)


def metrics(of: TrainedRun) -> list[dict[str, Any]]:
    lines = paths.room("runs", of.name).joinpath("metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("change", ["recipe", "model", "data"])
def test_a_changed_run_is_refused_and_named(recipe: Recipe, change: str, tiny_path: Path, tmp_path: Path) -> None:
    interrupted(recipe)
    other, said = recipe, ""
    if change == "recipe":
        other = other.model_copy(update={"train": other.train.model_copy(update={"learning_rate": 5e-3})})
        said = "recipe.train.learning_rate was 0.01, is 0.005"
    elif change == "data":
        file = Path(str(recipe.data.path)) / "train.jsonl"
        file.write_text(file.read_text().replace("1 + 1", "1 - 1"))
        said = "data.0 was '12 rows"
    else:
        copy = tmp_path / "copy"
        copy.mkdir()
        for file in tiny_path.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        arrays: dict[str, mx.array] = mx.load(str(copy / "model.safetensors"))  # type: ignore[assignment]
        arrays["model.norm.weight"] = arrays["model.norm.weight"] * 2
        mx.save_safetensors(str(copy / "model.safetensors"), arrays, {"format": "mlx"})
        other, said = other.model_copy(update={"model": str(copy)}), "model.fingerprint was"
    with pytest.raises(TrainingError) as error:
        train_adapter(other, resume=True)
    assert said in error.value.message and "--force" in str(error.value.hint)
    train_adapter(other, resume=True, force=True)
    assert weights()


def test_a_moved_base_and_moved_data_are_the_same(recipe: Recipe, tiny_path: Path, tmp_path: Path) -> None:
    interrupted(recipe)
    link = tmp_path / "elsewhere"
    link.symlink_to(tiny_path)
    data = Path(str(recipe.data.path)).rename(tmp_path / "moved")
    moved = recipe.model_copy(update={"model": str(link), "data": recipe.data.model_copy(update={"path": str(data)})})
    assert train_adapter(moved, resume=True).finished.iters == 4


def test_an_unfinished_run_is_not_overwritten(recipe: Recipe) -> None:
    interrupted(recipe)
    with pytest.raises(NameTaken, match="unfinished run") as error:
        train_adapter(recipe)
    assert "--resume" in str(error.value.hint)


def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(recipe: Recipe, home: Path) -> None:
    code = """if True:
        import time
        from mlx_lora.store.lock import locked
        with locked("mine"):
            print("held", flush=True)
            time.sleep(99)
    """
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    try:
        for use in (
            lambda: train_adapter(recipe),
            lambda: registry.remove("mine"),
            lambda: registry.rename("mine", "x"),
        ):
            with pytest.raises(NameTaken, match="another process is training 'mine'"):
                use()
    finally:
        other.kill()
        other.communicate()
    assert train_adapter(recipe).finished.iters == 4


def test_what_a_killed_process_left_is_cleared_and_put_back(recipe: Recipe, home: Path) -> None:
    """Killed between two renames, the adapter that was there lies in a directory without a name."""
    train_adapter(recipe)
    before, aside = weights(), home / "adapters" / ".mine.abcd1234"
    aside.mkdir()
    (home / "adapters" / "mine").rename(aside / "old")
    for leftover in (home / "runs" / "mine" / ".checkpoint-2.abcd1234", home / "adapters" / ".mine.wxyz1234"):
        (leftover / "inner").mkdir(parents=True)
    other = home / "adapters" / ".mine.2.abcd1234"  # of another name
    other.mkdir()
    with locked("mine"):
        assert weights() == before and other.exists()
    assert not aside.exists() and not list((home / "runs" / "mine").glob(".*"))
    assert [path.name for path in (home / "adapters").glob(".*")] == [other.name]


def test_a_full_disk_is_noticed_before_the_first_step(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(paths.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MlxLoraError, match="has 1 kB free"):
        train_adapter(recipe)
    assert registry.names() == []


def test_a_finished_run_keeps_no_optimizer_state(recipe: Recipe, home: Path) -> None:
    train_adapter(recipe)
    files = {str(path.relative_to(home / "runs" / "mine")) for path in (home / "runs" / "mine").rglob("*")}
    assert files == {
        "recipe.yaml", "metrics.jsonl", "last", "last/adapters.safetensors", "last/adapter_config.json",
        "last/manifest.json",
    }  # fmt: skip


def changed(recipe: Recipe, **train: Any) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})


def until_step(step: int) -> Listener:
    """Ask to stop once a step is done, as Ctrl-C does."""
    done: list[int] = []
    return Listener(event=lambda event: done.append(getattr(event, "step", 0)), should_stop=lambda: step in done)


def test_force_over_a_finished_adapter_keeps_it_until_the_new_run_has_finished(recipe: Recipe) -> None:
    """Interrupted, the new run keeps its checkpoint, also when it is interrupted again; finished, it replaces."""
    train_adapter(recipe)
    before, other = weights(), recipe.model_copy(update={"seed": 7})
    stopped = train_adapter(other, force=True, listener=until_step(2))
    assert stopped.kept_old and stopped.finished.iters == 2 and weights() == before
    assert stopped.path == paths.room("runs", "mine") / "last" and store.read(stopped.path).arrays
    assert [entry.state for entry in registry.entries()] == ["finished"], "it is still the old one"
    record = runs.read("mine")
    assert record.state == "unfinished" and record.checkpoints[-1] == 2 and record.recipe and record.recipe.seed == 7
    again = train_adapter(other, resume=True, listener=until_step(3))
    assert again.kept_old and again.finished.iters == 3 and weights() == before
    assert not train_adapter(other, resume=True).kept_old
    after = weights()
    train_adapter(other.model_copy(update={"name": "whole"}))
    assert after == weights("whole") != before and runs.read("mine").state == "finished"


def test_without_force_an_interrupted_run_is_stored_as_unfinished(recipe: Recipe) -> None:
    stopped = train_adapter(recipe, listener=until_step(2))
    assert not stopped.kept_old and stopped.path == registry.find("mine")
    assert [(entry.name, entry.state) for entry in registry.entries()] == [("mine", "unfinished")]
    train_adapter(recipe, resume=True)
    assert [(entry.name, entry.state) for entry in registry.entries()] == [("mine", "finished")]


@pytest.mark.parametrize("old", ["finished", "unfinished"])
@pytest.mark.parametrize("ends", ["dies", "is stopped before a step", "fails before a step"])
def test_the_old_run_stays_until_the_new_one_has_a_checkpoint(recipe: Recipe, old: str, ends: str) -> None:
    recipe = changed(recipe, save_every=2)
    if old == "finished":
        train_adapter(recipe)
    else:
        interrupted(recipe)
    before, kept = runs.read("mine"), weights() if old == "finished" else None
    other = recipe.model_copy(update={"seed": 7})
    if ends == "dies":
        with pytest.raises(Stopped):
            train_adapter(other, force=True, listener=stop_after(1))
    elif ends == "fails before a step":
        with pytest.raises(TrainingError):
            train_adapter(changed(other, cache_prefix="on"), force=True)
    else:
        with pytest.raises(KeyboardInterrupt):
            train_adapter(other, force=True, listener=Listener(should_stop=lambda: True))
    assert runs.read("mine") == before
    assert kept is None or weights() == kept
    with locked("mine"):  # the next one who uses the name clears what a dead process has left
        pass
    assert [path.name for path in paths.room("runs", "mine").parent.iterdir()] == ["mine"]
    if old == "unfinished":
        assert train_adapter(recipe, resume=True).finished.iters == 4


def test_a_forced_run_that_dies_after_its_checkpoint_goes_on_and_replaces(recipe: Recipe) -> None:
    train_adapter(recipe)
    before, other = weights(), recipe.model_copy(update={"seed": 7})
    with pytest.raises(Stopped):
        train_adapter(other, force=True, listener=stop_after(3))
    assert weights() == before and runs.read("mine").state == "unfinished"
    with pytest.raises(NameTaken, match="unfinished run"):
        train_adapter(other)
    train_adapter(other, resume=True)
    train_adapter(other.model_copy(update={"name": "whole"}))
    assert weights() == weights("whole")


def test_resume_of_a_finished_run_says_so_and_how_to_train_on(recipe: Recipe) -> None:
    train_adapter(recipe)
    for again in (recipe, changed(recipe, iters=8)):
        with pytest.raises(TrainingError, match="run 'mine' is finished after 4 steps") as error:
            train_adapter(again, resume=True)
        assert "--force train.iters=8" in str(error.value.hint) and "recipe.yaml" in str(error.value.hint)


def test_resume_of_a_name_that_is_not_there_names_the_nearest(recipe: Recipe) -> None:
    interrupted(recipe)
    with pytest.raises(MlxLoraError, match="no run 'mien'; did you mean 'mine'?"):
        train_adapter(recipe.model_copy(update={"name": "mien"}), resume=True)


@pytest.mark.real
def test_a_finished_run_with_a_constant_rate_trains_on_to_the_bytes_of_a_longer_one(recipe: Recipe) -> None:
    constant = changed(recipe, schedule="constant", warmup=0.0, save_every=None)
    longer = changed(constant, iters=7)
    train_adapter(constant)
    before = weights()
    assert runs.read("mine").state == "finished" and runs.read("mine").checkpoints == [4]
    with pytest.raises(TrainingError, match="is finished") as error:
        train_adapter(constant, resume=True)
    assert "mlx-lora train --name mine --resume train.iters=8 trains on" in str(error.value.hint)
    with pytest.raises(TrainingError, match="has done 4 steps, and 3 are asked for"):
        train_adapter(changed(constant, iters=3), resume=True)
    stopped = train_adapter(longer, resume=True, listener=until_step(6))
    assert stopped.kept_old and stopped.finished.iters == 6 and weights() == before, "what was finished stays"
    assert runs.read("mine").recipe == longer.model_copy(update={"data": runs.read("mine").recipe.data})  # type: ignore[union-attr]
    train_adapter(longer, resume=True)
    train_adapter(longer.model_copy(update={"name": "whole"}))
    assert weights() == weights("whole") != before


@pytest.mark.parametrize(
    ("change", "said"),
    [({"schedule": "cosine"}, "rates of a cosine schedule"), ({"schedule": "constant", "warmup": 0.3}, "warm-up")],
)
def test_a_longer_run_of_other_rates_is_refused(recipe: Recipe, change: dict[str, Any], said: str) -> None:
    begun = changed(recipe, **change)
    interrupted(begun)
    with pytest.raises(TrainingError, match=said):
        train_adapter(changed(begun, iters=12), resume=True)
    assert train_adapter(begun, resume=True).finished.iters == 4


def test_how_often_a_run_saves_may_change(recipe: Recipe) -> None:
    interrupted(recipe)
    assert train_adapter(changed(recipe, save_every="auto"), resume=True).finished.iters == 4


def test_resume_reads_the_checkpoint_once(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(recipe)
    read: list[Path] = []
    real = checkpoint.read_arrays
    monkeypatch.setattr(checkpoint, "read_arrays", lambda file: read.append(file) or real(file))
    train_adapter(recipe, resume=True)
    assert len(read) == 1
