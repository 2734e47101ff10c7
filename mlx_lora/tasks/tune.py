"""Tuning: one load of the base, one training after another on it, a line in a record for each, a recipe in the end.

    tunings/<name>/tuning.json     a line for each trial that is done, written whole after each of them

A line stays valid while recipe, base, training and validation rows don't change, so the same command goes on where it
was interrupted. Test rows are never read. No adapter is stored: `train` makes it from the recipe. `study.tune` says
what is tried next.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mlx_lora import methods, paths, ui
from mlx_lora.config import Recipe, number
from mlx_lora.data.batch import steps_per_epoch
from mlx_lora.data.prepare import Prepared, prepare
from mlx_lora.data.rows import trained
from mlx_lora.data.virtual import virtual_of
from mlx_lora.errors import MlxLoraError, RecipeError, TrainingError
from mlx_lora.models.open import OpenModel, open_model
from mlx_lora.settings import translated
from mlx_lora.store.lock import locked
from mlx_lora.study.trials import Found, Line, Space, Trial
from mlx_lora.study.tune import Plan
from mlx_lora.tasks.automatic import resolved
from mlx_lora.tasks.compare import Record, made_of
from mlx_lora.tasks.required import required
from mlx_lora.tasks.train import Listener
from mlx_lora.tasks.trial import Bench, OutOfTime
from mlx_lora.tasks.tuned import Tuned
from mlx_lora.train.automatic import KEYS
from mlx_lora.train.optim import total_steps

FILE = "tuning.json"
SECTIONS = ("adapter", "data", "train")


def tune(
    recipe: Recipe,
    words: Sequence[str],
    *,
    minutes: float,
    listener: Callable[[], Listener] = Listener,
    stage: Callable[[str], None] = lambda text: None,
) -> Tuned:
    """Try trainings for `minutes` and say which is best; what the `key=value` words have set in the recipe stays.

    Raises RecipeError without validation rows, and TrainingError where the time is too short for two trainings to be
    compared, or where every one of them failed. What is done is recorded after each training.
    """
    started = time.monotonic()
    name, asked = required(recipe), _asked(recipe, words)
    with locked(name):
        opened = open_model(str(recipe.model))
        prepared = _rows(recipe, opened, listener(), stage)
        recipe, chosen = resolved(recipe, opened, rows=len(prepared.train), valid=len(prepared.valid))
        for sentence in chosen.sentences:
            if sentence.startswith(("train.epochs ", "train.learning_rate ")):  # trials are evaluated in their own way
                stage(sentence)
        space, per_epoch = _space(recipe, asked, prepared)
        bench = Bench(recipe, opened, prepared, space.default, listener, stage)
        record = Record(paths.room("tunings", name) / FILE)
        of = made_of(recipe) | {"asked": sorted(asked)}
        lines = _recorded(record, of)
        before = sum(line.seconds for line in lines)

        def used() -> float:
            return before + time.monotonic() - started

        for line in _trials(bench, space, lines, minutes * 60, used):
            record.put(line.trial.name, line, made_of=of)
            record.write()
            stage(_said(line, space))
        found = Plan(space, lines, seconds=minutes * 60, used=used()).found()
        if found is None or found.compared < 2:
            raise _nothing(found, lines, space, minutes)
        return Tuned(recipe, asked, space, per_epoch, found, lines, used(), record.file)


def _trials(bench: Bench, space: Space, lines: list[Line], seconds: float, used: Callable[[], float]) -> Iterator[Line]:
    """Run what the plan asks for while there is time; each line is added to `lines`."""
    while (plan := Plan(space, lines, seconds=seconds, used=used())) and (trial := plan.next()):
        takes = f", about {ui.duration(plan.predicted(trial))}" if lines else ""
        bench.stage(f"{len(lines) + 1}: {trial.name}{takes}; {used() / 60:.1f} of {seconds / 60:g} minutes used")
        try:
            line = bench.run(trial, plan.looks(trial.steps), time.monotonic() + seconds - used())
        except OutOfTime:
            bench.stage("the time is up: this one is left out")
            return
        lines.append(line)
        yield line


def _rows(recipe: Recipe, opened: OpenModel, listener: Listener, stage: Callable[[str], None]) -> Prepared:
    stage(f"reading {recipe.data.path}")
    prepared = prepare(
        str(recipe.data.path), recipe.data, opened.tokenizer,
        seed=recipe.seed, progress=listener.progress, virtual=virtual_of(recipe.adapter),
    )  # fmt: skip
    for note in prepared.notes:
        stage(note)
    if not prepared.valid:
        raise RecipeError(
            "validation rows choose between trainings, and there are none",
            hint="add a valid file, or set data.valid_fraction",
        )
    return prepared


def _space(recipe: Recipe, asked: dict[str, Any], prepared: Prepared) -> tuple[Space, int]:
    """What may be tried, and the steps of an epoch."""
    settings, adapter = recipe.train, recipe.adapter
    per_epoch = steps_per_epoch(
        len(prepared.train), batch_size=settings.batch_size, grad_accumulation=settings.grad_accumulation
    )
    targets = adapter.targets if isinstance(adapter.targets, str) else tuple(adapter.targets)
    default = Trial(number(settings.learning_rate), adapter.rank, targets, total_steps(settings, per_epoch))
    parts = methods.parts(adapter.method)
    space = Space(
        default,
        tuple(trained(prepared.valid).tolist()),
        rates="train.learning_rate" not in asked,
        ranks="adapter.rank" not in asked and bool(set(parts) & set(methods.LOW_RANK)),
        targets="adapter.targets" not in asked and targets == "attention",
        epochs=not {"train.epochs", "train.iters"} & asked.keys(),
    )
    if not (space.rates or space.ranks or space.targets or space.epochs):
        raise RecipeError("every setting that tuning could change is given", hint="leave train.learning_rate out")
    return space, per_epoch


def _asked(recipe: Recipe, words: Sequence[str]) -> dict[str, Any]:
    """What the words have set, by dotted key; `auto` sets nothing."""
    values, asked = recipe.model_dump(mode="json"), dict[str, Any]()
    for word in words:
        section, _, key = translated(word).partition("=")[0].partition(".")
        if section not in SECTIONS:
            asked[section] = values[section]
            continue
        keys = [key.partition(".")[0]] if key else sorted(getattr(recipe, section).model_fields_set)  # section={…}
        asked |= {f"{section}.{key}": values[section][key] for key in keys}
    left_out = {"model", "name", "data.path"} | {f"train.{key}" for key in KEYS if asked.get(f"train.{key}") == "auto"}
    return {key: value for key, value in asked.items() if key not in left_out}


def _recorded(record: Record, of: dict[str, Any]) -> list[Line]:
    """The lines that are still valid, in the order in which they were made. Raises MlxLoraError for a damaged one."""
    try:
        return [Line.read(fields) for fields in map(lambda name: record.fields(name, of), record.runs) if fields]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise MlxLoraError(f"{record.file} isn't a tuning's record", hint="remove it to begin again") from None


def _said(line: Line, space: Space) -> str:
    if line.error:
        return f"  failed: {line.error}"
    return f"  validation loss {sum(line.losses) / sum(space.tokens):.4f} in {ui.duration(line.seconds)}"


def _nothing(found: Found | None, lines: Sequence[Line], space: Space, minutes: float) -> TrainingError:
    """Why there is no result, with the time that one would take."""
    if lines and found is None:
        return TrainingError(f"every training failed: {lines[0].error}", hint="try it alone with `mlx-lora train`")
    if not lines:
        return TrainingError(f"{_minutes(minutes)} over before the first training", hint="--minutes allows more")
    plan = Plan(space, lines, seconds=minutes * 60, used=0)
    enough = math.ceil(max(plan.enough() / 60, minutes + 1))
    return TrainingError(
        f"{_minutes(minutes)} too short to compare two trainings",
        hint=f"--minutes {enough} compares short ones, and goes on from what is done",
    )


def _minutes(count: float) -> str:
    return "1 minute is" if count == 1 else f"{count:g} minutes are"
