"""`data split`: the rows of one file into train, valid and test files.

The rows are read twice: first for problems and to count what goes where, then to be written one by one. The lines of a
.jsonl file are copied as they are; rows of other files are written as messages or as text.
"""

from __future__ import annotations

import codecs
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_lora.config import Data
from mlx_lora.data import split, write
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.errors import MlxLoraError, NameTaken
from mlx_lora.tasks.convert_data import Rows, one_file

CHUNK = 1 << 20


@dataclass
class Split:
    """What was written: rows by split, in `groups` that were kept together, and whether lines were `copied`.

    `learn_more` rows learned one answer of several before, and learn all of them as messages; none where lines were
    copied.
    """

    out: str
    rows: dict[str, int]
    groups: int
    seed: int
    copied: bool
    learn_more: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def split_data(
    path: str | Path,
    out: Path,
    settings: Data,
    *,
    fractions: split.Fractions,
    seed: int = 0,
    force: bool = False,
    progress: OnFile = silent,
) -> Split:
    """Write the rows of `path` to files in the folder `out`.

    Raises DataError with every problem of the rows, MlxLoraError where a split would have no row, NameTaken where
    there are files already; then nothing is written.
    """
    rows = Rows(one_file(path), settings)
    targets = {name: out / f"{name}{write.ENDING}" for name in fractions.wanted}
    _check_folder(out, targets, rows.file, force=force)
    assignment, learn_more = split.Assignment(fractions, seed), 0
    for _, example in rows:
        assignment.add(example)
        learn_more += write.learns_more(example)
    rows.refuse_problems()
    _refuse_empty(assignment)
    copied = _holds_lines(rows.file)
    _write(rows, targets, assignment, copied, progress)
    _remove_former(out, targets)
    return Split(str(out), assignment.rows(), assignment.groups, seed, copied, 0 if copied else learn_more)


def _write(rows: Rows, targets: dict[str, Path], assignment: split.Assignment, copied: bool, progress: OnFile) -> None:
    advance = progress(f"writing {rows.file.name}", rows.count)
    with write.files_written(targets.values()) as files, open(rows.file, "rb") as source:
        read = 0
        for line, example in rows:
            side = split.side(split.group(example), assignment.fractions, assignment.seed)
            written = write.line(example)
            if copied:
                while read < line:
                    written, read = source.readline(), read + 1
                written = written.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n") + b"\n"
            files[targets[side]].write(written)
            advance()


def _check_folder(out: Path, targets: dict[str, Path], file: Path, *, force: bool) -> None:
    """Raise NameTaken unless the files may be written, and will be the only ones of their splits."""
    if out.exists() and not out.is_dir():
        raise NameTaken(f"{out} is not a directory", hint="name a folder")
    every = [out / f"{name}{write.ENDING}" for name in split.SPLITS]
    write.check_targets(
        [path for path in every if path in targets.values() or path.exists()], force=force, sources=[file]
    )
    for name in split.SPLITS:
        others = [path for path in out.glob(f"{name}.*") if path.suffix != write.ENDING]
        if others:
            raise NameTaken(f"{out} has {others[0].name}", hint="choose a folder of its own")


def _remove_former(out: Path, targets: dict[str, Path]) -> None:
    """With --force: a former split's file that is not replaced would hold rows that train now has."""
    for name in split.SPLITS:
        if name not in targets:
            (out / f"{name}{write.ENDING}").unlink(missing_ok=True)


def _refuse_empty(assignment: split.Assignment) -> None:
    if missing := assignment.missing():
        other = assignment.other_seed()
        rows = sum(assignment.rows().values())
        raise MlxLoraError(
            f"no row would go to {' and '.join(missing)}: {rows} rows make {assignment.groups} groups to part",
            hint="choose larger or fewer shares" if other is None else f"--seed {other} leaves no file empty",
        )


def _holds_lines(file: Path) -> bool:
    """Whether a file is .jsonl in UTF-8 with an object a line, as far as its first bytes and its encoding tell."""
    if file.suffix != write.ENDING:
        return False
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(file, "rb") as stream:
        first = stream.read(CHUNK)
        if not first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
            return False
        try:
            decoder.decode(first)
            while chunk := stream.read(CHUNK):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True
