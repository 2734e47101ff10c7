"""Write a report on a run or a verdict: one HTML file, from records in the home, and from the user's files if asked.

Records hold no text. With `texts`, rows are read again from the files that the run was trained with, and answered anew
by base and adapter. Only a file that the user has named gets them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_lora import paths
from mlx_lora.config import Data, Recipe
from mlx_lora.data.encode import Encoder
from mlx_lora.data.fit import encode_file
from mlx_lora.data.prepare import prepare
from mlx_lora.data.read import find_splits, sha256
from mlx_lora.data.rows import Row
from mlx_lora.errors import MlxLoraError, NameTaken, nearest
from mlx_lora.models.load import LoadedModel
from mlx_lora.report.page import MARK
from mlx_lora.report.run import Report, html
from mlx_lora.report.sample import Sample
from mlx_lora.serve.conversation import trained
from mlx_lora.store import registry
from mlx_lora.store import run as runs
from mlx_lora.store import verdict as verdicts
from mlx_lora.store.adapter import StoredAdapter, read
from mlx_lora.store.base import base_for
from mlx_lora.tasks.samples import COMPARED, answered, question

SAMPLES, CHANGED, MOST_SECONDS = 5, 4, 120.0
NO_TEXTS = "Rows and answers are left out: a report has them only in a file that is named with --out."

OnToken = Callable[[int, int], None]


@dataclass(frozen=True)
class Record:
    """What the home has under a name: a run, a verdict's record, or both."""

    name: str
    run: runs.RunRecord | None
    verdict: verdicts.Verdict | None

    @property
    def results(self) -> list[verdicts.Judged]:
        return self.verdict.results if self.verdict else []


def find(name: str) -> Record:
    """The run and the verdict called `name`. Raises MlxLoraError where there is neither, or one is damaged."""
    name = paths.check_name(name)
    known, judged = runs.names(), verdicts.names()
    if name not in (*known, *judged):
        close = nearest(name, [*known, *judged]) if known or judged else "; there are none yet"
        raise MlxLoraError(f"no run and no verdict {name!r}{close}", hint="mlx-lora runs list")
    run = runs.read(name) if name in known else None
    return Record(name, run, verdicts.read(name) if name in judged else None)


def check(out: Path) -> None:
    """Raise NameTaken unless a report may be written to `out`: over another report, or where nothing is."""
    if os.path.lexists(out) and not (out.is_file() and MARK.encode() in out.read_bytes()[:200]):
        raise NameTaken(f"{out} exists, and is no report of mlx-lora", hint="name another file with --out")
    if not out.parent.is_dir():
        raise MlxLoraError(f"{out.parent} is no directory", hint="make it, or name another file with --out")


def write(out: Path, content: str) -> None:
    """Write a report whole or not at all, readable by the user alone."""
    descriptor, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content.encode())
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def report(
    record: Record,
    *,
    texts: bool = False,
    model: str | None = None,
    data: str | None = None,
    stage: Callable[[str], None] = lambda text: None,
    on_token: OnToken = lambda done, total: None,
) -> str:
    """The report as HTML. `texts` adds rows and answers, from `data` or the files that the run was trained with.

    What can't be had of them, because a file has changed or the base is gone, is said in the report and by `stage`.
    """
    adapter = _adapter(record)
    plain = Report(record.name, record.run, adapter.manifest if adapter else None, record.results, note=NO_TEXTS)
    if not texts:
        return html(plain)
    gone = _Missing(stage)
    found: tuple[list[Sample], list[Sample]] = ([], [])
    with gone.noted():
        found = _texts(record, adapter, model, data, gone, on_token)
    return html(replace(plain, samples=found[0], changed=found[1], note=gone.note))


class Unread(MlxLoraError):
    """Rows that can't be had. The message goes into the report too: it calls files by their names, without folders."""


class _Missing:
    """What of the rows and answers isn't there, for `stage` and for the page, which may be given away."""

    def __init__(self, stage: Callable[[str], None]):
        self.stage, self.note = stage, ""

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Go on after the block where it raises MlxLoraError, and say so."""
        try:
            yield
        except MlxLoraError as fault:
            self.stage(f"without rows and answers: {fault.message}")
            why = fault.message if isinstance(fault, Unread) else "mlx-lora report has said why"
            self.note += f"Rows and answers are missing here: {why}. "


def _adapter(record: Record) -> StoredAdapter | None:
    """The adapter of a run, or the first of a verdict; None where it is gone."""
    names = [record.name] if record.run else [result.adapter for result in record.results]
    for name in names:
        try:
            return read(registry.find(name))
        except MlxLoraError:
            continue
    return None


def _texts(
    record: Record, adapter: StoredAdapter | None, model: str | None, data: str | None,
    gone: _Missing, on_token: OnToken,
) -> tuple[list[Sample], list[Sample]]:  # fmt: skip
    """Answers to validation rows of the run, and to rows that a verdict calls fixed or broken."""
    if adapter is None:
        raise Unread(f"the adapter of {record.name} is not in the home any more")
    recipe = record.run.recipe if record.run else None
    places = [place for place in (data, recipe.data.path if recipe else None) if place]
    if not places:
        raise Unread("a verdict's record doesn't say where its rows lie: --data names them")
    gone.stage(f"reading {' and '.join(places)}")
    opened = base_for(model or (recipe.model if recipe else None), [adapter])
    wanted: dict[int, Row] = {}
    rows: Sequence[Row] = []
    if record.verdict:
        with gone.noted():
            wanted = _changed_rows(record.verdict, adapter, places, opened.tokenizer)
    if recipe:
        with gone.noted():
            rows = _validation_rows(recipe, adapter, places, opened.tokenizer)
    if not wanted and not rows:
        return [], []
    gone.stage(f"loading {registry.base_name(opened.path)}")
    loaded = registry.open_base(opened, [adapter])
    return _answer(loaded, adapter, rows, wanted, on_token)


def _answer(
    loaded: LoadedModel, adapter: StoredAdapter, rows: Sequence[Row], wanted: dict[int, Row], on_token: OnToken
) -> tuple[list[Sample], list[Sample]]:
    asked: dict[str | None, StoredAdapter | None] = {None: None, adapter.name: adapter}
    chosen = [row for row in rows if question(row)][:SAMPLES]
    wanted = {number: row for number, row in wanted.items() if question(row)}
    both = [*chosen, *wanted.values()]
    found = list(answered(loaded, both, asked, beside=rows, on_token=on_token, seconds=MOST_SECONDS))
    changed = [replace(sample, row=number) for number, sample in zip(wanted, found[len(chosen) :], strict=True)]
    return found[: len(chosen)], changed


def _changed_rows(
    verdict: verdicts.Verdict, adapter: StoredAdapter, places: Sequence[str], tokenizer: Any
) -> dict[int, Row]:
    """A few of the rows that a verdict calls fixed or broken, by their numbers in its file."""
    numbers = [n for result in verdict.results for n in (*result.fixed_rows[:CHANGED], *result.broken_rows[:CHANGED])]
    if not numbers:
        return {}
    file = _file_of(verdict, places)
    settings = Data.model_validate((adapter.manifest.recipe or {}).get("data", {}) | {"path": None})
    encoded = encode_file(file, Encoder(tokenizer, settings, trained(adapter).format(tokenizer)), lambda: None)
    last = {int(group): place for place, group in enumerate(encoded.rows.groups)}
    return {number: encoded.rows[last[number]] for number in dict.fromkeys(numbers) if number in last}


def _file_of(verdict: verdicts.Verdict, places: Sequence[str]) -> Path:
    """The file that a verdict was given on, by its hash, among those of some data paths."""
    for place in places:
        for file in find_splits(place).values():
            if sha256(file) == verdict.data.sha256:
                return file
    names = " and ".join(Path(place).name for place in places)
    raise Unread(f"no file of {names} is the one that the verdict was given on: --data names it")


def _validation_rows(recipe: Recipe, adapter: StoredAdapter, places: Sequence[str], tokenizer: Any) -> Sequence[Row]:
    """The run's validation rows, from the first of some data paths that has the files it was trained with."""
    before, changed = {str(entry.get("sha256")) for entry in adapter.manifest.data}, list[str]()
    for place in places:
        read_then = [file for split, file in find_splits(place).items() if split != "test"]
        changed = [file.name for file in read_then if sha256(file) not in before]
        if not changed:
            prepared = prepare(place, recipe.data, tokenizer, seed=recipe.seed)
            return [] if prepared.format == "text" else prepared.valid[:COMPARED]
    raise Unread(f"{changed[0]} has changed since the run")
