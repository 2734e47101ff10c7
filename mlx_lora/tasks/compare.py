"""Run a comparison: train each recipe, evaluate the stored adapter on the test rows, and record each result.

    comparisons/<name>/comparison.json     a line for each run that is done, written whole after each of them
    comparisons/<name>/comparison.png      loss against trainable parameters
    adapters/<name>-<run>/                 the trained adapter, stored like any other

A line stays valid while its recipe, its base and its data don't change, so the same command continues a comparison that
was interrupted. Of a recipe's learning rates, only the one with the lowest validation loss is evaluated on the test
rows. `study.compare` reads the recipes and judges the lines.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from mlx_lora import paths
from mlx_lora.config import Recipe, number
from mlx_lora.data.read import find_splits, read, sha256
from mlx_lora.data.rows import trained
from mlx_lora.errors import DataError, MlxLoraError, NameTaken, Problem, RecipeError
from mlx_lora.models.chat_format import ChatFormat
from mlx_lora.models.load import load_stored, ready
from mlx_lora.models.open import open_model
from mlx_lora.serve.engine import Engine
from mlx_lora.store import adapter as store
from mlx_lora.store import fingerprint
from mlx_lora.store.lock import locked
from mlx_lora.study.compare import Candidate, Line, best, draw
from mlx_lora.study.evaluate import Questions, Result, evaluate, questions
from mlx_lora.tasks.required import check
from mlx_lora.tasks.train import Listener, train_adapter

FILE, PLOT = "comparison.json", "comparison.png"
# Generated tokens at most, beyond the length of the longest right answer: a longer answer can't match.
EXTRA_TOKENS = 8
UNFINISHED = {
    "nonfinite": "the loss or the gradient was not finite three steps in a row",
    "memory": "training took more memory than it may",
}


@dataclass
class Outcome:
    """The result for the table and the JSON: one line for each recipe; `file` holds the lines of all runs."""

    name: str
    file: Path
    lines: list[Line]
    plot: Path | None

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "file": str(self.file),
            "plot": str(self.plot) if self.plot else None,
            "results": [line.as_dict() for line in self.lines],
        }


class AsDict(Protocol):
    """A line of a record: a comparison's, or a tuning's."""

    def as_dict(self) -> dict[str, Any]: ...


class Record:
    """A comparison's file, or a tuning's: what each run depends on, its line once it is trained, the test rows that a
    comparison measured it on."""

    def __init__(self, file: Path):
        self.file = file
        self.runs: dict[str, dict[str, Any]] = {}
        if file.is_file():
            try:
                self.runs = dict(json.loads(file.read_text(encoding="utf-8"))["runs"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise MlxLoraError(f"{file} can't be read: {error}", hint="remove it to begin again") from None

    def fields(self, name: str, made_of: dict[str, Any]) -> dict[str, Any] | None:
        """A run's line as it was put; None if there is none, or what it depends on has changed."""
        entry = self.runs.get(name, {})
        return entry.get("line") if entry.get("made_of") == made_of else None

    def line(self, name: str, made_of: dict[str, Any]) -> Line | None:
        """A trained run's line; None if the run failed or what it depends on has changed."""
        fields = self.fields(name, made_of)
        return Line(**fields) if fields and not fields.get("error") else None

    def put(self, name: str, line: AsDict | None, **entries: dict[str, Any]) -> None:
        """Set a run's line, and its `made_of` or `measured_on`."""
        self.runs[name] = {**self.runs.get(name, {}), **entries, "line": line.as_dict() if line else None}

    def write(self) -> None:
        """Write the file whole, by renaming a temporary one; readable by its owner only."""
        for folder in (self.file.parent.parent, self.file.parent):  # mkdir sets the mode of the last folder only
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = self.file.with_name(f".{self.file.name}.new")
        with paths.created(temporary) as stream:
            stream.write(json.dumps({"runs": self.runs}, indent=1).encode() + b"\n")
        paths.synchronize(temporary)
        os.replace(temporary, self.file)


def compare(
    name: str,
    runs: Sequence[Candidate],
    *,
    out: Path | None = None,
    rows: int | None = None,
    force: bool = False,
    listener: Callable[[], Listener] = Listener,
    stage: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Train every run that has no line yet, evaluate on the first `rows` test rows (None: all), and draw the plot.

    The line of a run that fails says why, and the other runs go on. Faults that would stop every run are raised before
    any training. Raises KeyboardInterrupt when training was interrupted; only that run is lost.
    """
    folder = out or paths.room("comparisons", name)
    if folder.exists() and not (folder / FILE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise NameTaken(f"{folder} holds something else", hint="choose another --name, or another --out")
    with locked(name):
        record = Record(folder / FILE)
        made_of = {run.name: _made_of(run) for run in runs}
        todo = [run for run in runs if record.line(run.name, made_of[run.name]) is None]
        _check_all(name, todo, record, force=force)
        for run in todo:
            record.put(run.name, None, made_of=made_of[run.name])
        record.write()
        done = len(runs) - len(todo)
        for label in dict.fromkeys(run.label for run in runs):
            same_label = [run for run in runs if run.label == label]
            for run in same_label:
                if record.line(run.name, made_of[run.name]) is None:
                    done += 1
                    stage(f"{done} of {len(runs)}: {run.name}")
                    record.put(run.name, _train_run(name, run, listener), made_of=made_of[run.name])
                    record.write()
            _measure_best(same_label, record, rows, listener, stage)
        lines = best(Line(**record.runs[run.name]["line"]) for run in runs)
        return Outcome(name, record.file, lines, _draw(lines, name, folder / PLOT, stage))


def _measure_best(
    runs: Sequence[Candidate],
    record: Record,
    rows: int | None,
    listener: Callable[[], Listener],
    stage: Callable[[str], None],
) -> None:
    """Of one recipe's runs, evaluate the one with the lowest validation loss on the test rows."""
    lines = [Line(**record.runs[run.name]["line"]) for run in runs]
    (chosen,) = best(lines)
    run = runs[lines.index(chosen)]
    measured_on = {"test": sha256(find_splits(str(run.recipe.data.path))["test"]), "rows": rows}
    if chosen.error or (chosen.loss is not None and record.runs[run.name].get("measured_on") == measured_on):
        return
    stage(f"measuring {run.name}")
    mx.clear_cache()  # frees memory that training used
    try:
        result = _evaluate(run, paths.room("adapters", chosen.adapter) if chosen.adapter else None, rows, listener())
        line = replace(chosen, loss=result.loss, exact_match=result.exact_match)
    except DataError:  # every run is measured on the same rows
        raise
    except MlxLoraError as fault:
        line = replace(chosen, error=fault.message)
    record.put(run.name, line, measured_on=measured_on)
    record.write()


def _check_all(name: str, todo: Sequence[Candidate], record: Record, *, force: bool) -> None:
    """Raise for faults that would stop a run before its first step, and for adapter names that are taken."""
    runs_per_label = Counter(run.label for run in todo)
    for run in todo:
        if run.bare:
            check(_with_name(name, run, "base"), force=True)
        else:
            check(_with_name(name, run), force=force or run.name in record.runs)
    for run in todo:
        data = run.recipe.data
        if runs_per_label[run.label] > 1 and not data.valid_fraction and "valid" not in find_splits(str(data.path)):
            raise RecipeError(
                "validation rows choose between learning rates, and there are none",
                hint="add a valid file, or set data.valid_fraction",
            )


def _with_name(name: str, run: Candidate, suffix: str | None = None) -> Any:
    """The run's recipe, named for the adapter that it trains."""
    return run.recipe.model_copy(update={"name": f"{name}-{suffix or run.name}"})


def _made_of(run: Candidate) -> dict[str, Any]:
    """What a run's line depends on, except the test rows. Paths aren't part of it, so files may move."""
    recipe = run.recipe
    if not recipe.model or not recipe.data.path:
        check(recipe, force=True)  # says what is missing
    splits = find_splits(str(recipe.data.path))
    if "test" not in splits:
        raise DataError(
            [Problem(str(recipe.data.path), 0, "has no test file")],
            hint="a comparison is judged on rows that training doesn't read: a folder with train.jsonl and test.jsonl",
        )
    found = made_of(recipe)
    if run.bare:
        found["recipe"] = {key: found["recipe"][key] for key in ("quantize", "data")}
    return found


def made_of(recipe: Recipe) -> dict[str, Any]:
    """What training with a recipe depends on, wherever its files lie."""
    return {
        "recipe": recipe.model_dump(
            mode="json", exclude={"model": True, "name": True, "data": {"path"}, "train": {"memory_limit_gb"}}
        ),
        "base": fingerprint.of_directory(open_model(str(recipe.model)).path),
        "data": {split: sha256(file) for split, file in find_splits(str(recipe.data.path)).items() if split != "test"},
    }


def _train_run(name: str, run: Candidate, listener: Callable[[], Listener]) -> Line:
    """Train a run, unless it is a base. A fault of this run alone becomes its line's `error`."""
    if run.bare:
        return Line(run.label)
    recipe = _with_name(name, run)
    asked = recipe.train.learning_rate
    line = Line(run.label, method=recipe.adapter.method, learning_rate=None if asked == "auto" else asked)
    try:
        trained = train_adapter(recipe, force=True, listener=listener())
    except DataError:  # every run reads the same rows
        raise
    except MlxLoraError as fault:
        return replace(line, error=fault.message)
    finished = trained.finished
    if finished.stopped_by == "interrupted":
        raise KeyboardInterrupt
    return replace(
        line,
        learning_rate=number(trained.recipe.train.learning_rate),
        parameters=finished.trainable_parameters,
        valid_loss=finished.best_valid_loss,
        seconds=finished.seconds,
        peak_memory_bytes=finished.peak_memory_bytes,
        adapter_bytes=(trained.path / store.WEIGHTS).stat().st_size,
        adapter=trained.path.name,
        error=UNFINISHED.get(finished.stopped_by),
    )


def _evaluate(run: Candidate, adapter: Path | None, rows: int | None, listener: Listener) -> Result:
    """Loss and exact match on the test rows, of the base alone or with the stored adapter."""
    recipe = run.recipe
    engine = Engine(ready(load_stored(str(recipe.model), quantization=recipe.quantize)))
    name = None if adapter is None else run.name
    if adapter is not None:
        end = ChatFormat.of(engine.loaded.tokenizer, recipe.data).own_end
        engine.add(run.name, store.wrappers_for(engine.loaded.model, store.read(adapter)), end=end)
    test = _test_questions(run, engine, rows)
    longest = int(trained(test.rows).max())
    advance = listener.progress(f"measuring {run.name}", len(test.rows) + len(test.prompts))
    return evaluate(engine, name, test, max_tokens=longest + EXTRA_TOKENS, on_row=advance)


def _test_questions(run: Candidate, engine: Engine, rows: int | None) -> Questions:
    path, settings = str(run.recipe.data.path), run.recipe.data
    exact = read(find_splits(path)["test"], settings).format != "text"
    test = questions(path, settings, engine.loaded.tokenizer, exact=exact, prefer=("test",))
    return test.first(rows)


def _draw(lines: Sequence[Line], title: str, file: Path, stage: Callable[[str], None]) -> Path | None:
    try:
        draw(lines, title, file)
    except ImportError:
        stage("matplotlib is not installed, so there is no plot: pip install 'mlx-lora[plots]'")
        return None
    return file
