"""`data canaries`: a copy of the data with rows that hold random secrets, to measure what an adapter remembers.

The rows are read twice: first for problems and to count them, then to be written one by one, in the shape that
`data.sources` has for their format. Where there is no validation file, some rows are set aside as one, so that training
sets no canary aside.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlx_lora import paths
from mlx_lora.config import Data
from mlx_lora.data import columns, readers, write
from mlx_lora.data.canaries import RECORD, Canary, Planting, most, rows_of
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.data.read import HINT, check_text, find_splits, sha256
from mlx_lora.data.sources import FORMATS
from mlx_lora.errors import DataError, MlxLoraError, NameTaken, Problem

# Share of the training rows that become validation rows where there is no file of them.
VALID = 0.1


@dataclass(frozen=True)
class Planted:
    """What was written into the folder `out`: rows by file, of which `copies` hold one of `canaries` secrets."""

    out: str
    rows: dict[str, int]
    canaries: int
    copies: int
    repeats: tuple[int, ...]
    seed: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def plant_canaries(
    path: str,
    out: Path,
    settings: Data,
    *,
    repeats: Sequence[int],
    each: int,
    seed: int = 0,
    force: bool = False,
    progress: OnFile = silent,
) -> Planted:
    """Write a copy of `path` with canaries among its training rows, and the record of them.

    Raises DataError with every problem of the rows, MlxLoraError for more canaries than there are names, NameTaken
    where there are files already; then nothing is written.
    """
    planting = Planting(seed, tuple(repeats), each, "")
    if planting.count > most():
        raise MlxLoraError(f"{planting.count} canaries, and there are names for {most()}", hint="a smaller --each")
    files = {split: _Rows(file, settings) for split, file in find_splits(path).items()}
    if "train" not in files:
        raise DataError([Problem(str(path), 0, "has no train.jsonl")], hint="name the file itself to use it alone")
    targets = {split: out / f"{split}{write.ENDING}" for split in {**files, "valid": None}}
    _check_folder(out, list(targets.values()), [rows.file for rows in files.values()], force=force)
    counts = {split: sum(1 for _ in rows) for split, rows in files.items()}
    if problems := [problem for rows in files.values() for problem in rows.problems]:
        raise DataError(problems, hint=HINT)
    aside = set() if "valid" in files else _set_aside(counts["train"], seed)
    places = planting.places(counts["train"] - len(aside))
    planting = replace(planting, format=files["train"].format, rows=rows_of(planting, places))
    written = _write(files, targets, counts, planting, places, aside, progress)
    _record(out, replace(planting, sha256=sha256(targets["train"])))
    return Planted(str(out), written, planting.count, planting.copies, planting.repeats, seed)


def _write(
    files: dict[str, _Rows],
    targets: dict[str, Path],
    counts: dict[str, int],
    planting: Planting,
    places: dict[int, Canary],
    aside: set[int],
    progress: OnFile,
) -> dict[str, int]:
    """Write the rows and, at their places, the canaries; returns the rows of each file."""
    written = dict.fromkeys(targets, 0)
    with write.files_written(targets.values()) as opened:

        def add(split: str, row: dict[str, Any]) -> None:
            opened[targets[split]].write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            written[split] += 1

        def plant() -> None:
            while canary := places.get(written["train"]):
                add("train", canary.row(planting.format))

        for split, rows in files.items():
            advance = progress(f"writing {targets[split].name}", counts[split])
            for number, row in enumerate(rows):
                plant()
                add("valid" if split == "train" and number in aside else split, row)
                advance()
        plant()
    return written


def _record(out: Path, planting: Planting) -> None:
    temporary = out / f".{RECORD}.new"
    temporary.unlink(missing_ok=True)
    with paths.created(temporary, "w") as file:
        file.write(planting.record())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, out / RECORD)
    paths.synchronize(out)


def _set_aside(rows: int, seed: int) -> set[int]:
    """The numbers of the rows that become validation rows; one stays on each side at least."""
    if rows < 2:
        return set()
    count = min(max(round(rows * VALID), 1), rows - 1)
    return set(random.Random(f"{seed} aside").sample(range(rows), count))


def _check_folder(out: Path, targets: list[Path], sources: list[Path], *, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise NameTaken(f"{out} is not a directory", hint="name a folder")
    write.check_targets(targets, force=force, sources=sources)
    others = [path for path in out.glob("*.*") if path not in targets and path.name != RECORD]
    if others:
        raise NameTaken(f"{out} has {others[0].name}", hint="choose a folder of its own")


class _Rows:
    """One file's rows in the shape of their format, read anew by each pass; `problems` are of the last one."""

    def __init__(self, file: Path, settings: Data):
        self.file, self.settings = file, settings
        self.format = ""
        self.problems: list[Problem] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.problems = []
        found: columns.Columns | None = None
        for line, row, problem, file in readers.rows(self.file, self.settings, lambda text: None):
            try:
                if row is None:
                    raise ValueError(problem)
                check_text(row)
                found = found or columns.find(row, self.settings)
                row = found.row(row)
                FORMATS[found.format].parse(row)
            except ValueError as error:
                self.problems.append(Problem(str(file or self.file), line, str(error)))
                if isinstance(error, columns.Unclear):
                    return
                continue
            self.format = found.format
            yield row
