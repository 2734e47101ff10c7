"""A data path and settings become train and validation rows, or one error listing every fault.

When there is no validation file, a fraction of the training examples is set aside: which ones is a function of the seed
and the number of examples alone. Rows of one example stay together, or validation would see what training has learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_lora.config import Data
from mlx_lora.data.encode import Encoder
from mlx_lora.data.fit import EncodedFile, encode_file, notes
from mlx_lora.data.read import HINT, find_splits, sha256
from mlx_lora.data.rows import Chosen, Row, RowFile
from mlx_lora.data.virtual import Virtual
from mlx_lora.errors import DataError, Problem

NO_PROMPT = "an infix goes between prompt and answer, and rows here are learned whole; adapter.position=prefix works"
OnFile = Callable[[str, int | None], Callable[[], None]]


@dataclass
class Prepared:
    """Rows ready to batch; `files` describes where they came from, without any of their text.

    `thinking` is how an adapter trained on them is asked (None: as the model has it). `notes` are for people.
    """

    train: Sequence[Row]
    valid: Sequence[Row]
    format: str
    truncated: int
    dropped: int
    files: list[dict[str, Any]] = field(default_factory=list)
    thinking: bool | None = None
    notes: list[str] = field(default_factory=list)


def silent(name: str, total: int | None) -> Callable[[], None]:
    """Progress for nobody."""
    return lambda: None


def prepare(
    path: str | Path,
    settings: Data,
    tokenizer: Any,
    *,
    seed: int = 0,
    progress: OnFile = silent,
    virtual: Virtual | None = None,
) -> Prepared:
    """Read, encode and split; rows have the adapter's virtual tokens, on top of `max_seq_length`, where it has any.

    Raises DataError with every problem of the files that training reads.
    """
    splits = find_splits(path)
    if "train" not in splits:
        raise DataError([Problem(str(path), 0, "has no train.jsonl")], hint="name the file itself to use it alone")
    encoder = Encoder(tokenizer, settings)
    prepared = Prepared([], [], "", 0, 0)
    files: dict[str, EncodedFile] = {}
    for name in ("train", "valid"):
        if name in splits:
            file = files[name] = encode_file(splits[name], encoder, progress(f"reading {splits[name].name}", None))
            prepared.truncated += file.truncated
            prepared.dropped += file.dropped
            prepared.format = prepared.format or file.format or ""
            prepared.files.append(_describe(file))
            prepared.notes += [f"{splits[name].name}: {note}" for note in (*file.notes, *notes(file))]
    if problems := _problems(files, virtual, settings):
        raise DataError(problems, hint=HINT)
    prepared.thinking = _thinking(files["train"], encoder)
    train = files["train"].rows
    if "valid" in files:
        sides: tuple[Sequence[Row], Sequence[Row]] = (train, files["valid"].rows)
    else:
        sides = set_aside(train, settings.valid_fraction, seed)
    prepared.train, prepared.valid = ([virtual.row(row) for row in side] if virtual else side for side in sides)
    return prepared


def set_aside(rows: RowFile, fraction: float, seed: int) -> tuple[Sequence[Row], Sequence[Row]]:
    """Split rows into (train, valid) by example; one stays on each side at least when a fraction is asked for."""
    groups = rows.groups
    examples = int(groups.max(initial=-1)) + 1
    if fraction == 0 or examples < 2:
        return rows, []
    count = min(max(round(examples * fraction), 1), examples - 1)
    chosen = np.zeros(examples, bool)
    chosen[np.random.default_rng([seed, examples]).permutation(examples)[:count]] = True
    aside = chosen[groups]
    return Chosen(rows, np.flatnonzero(~aside)), Chosen(rows, np.flatnonzero(aside))


def _problems(files: dict[str, EncodedFile], virtual: Virtual | None, settings: Data) -> list[Problem]:
    """Everything that is wrong with the files, and files of which no row is left once too long ones were dropped."""
    problems = [problem for file in files.values() for problem in file.problems]
    if virtual and virtual.position == "infix":
        whole = (file for file in files.values() if settings.mask == "all" or file.texts)
        problems += [Problem(str(file.path), 0, NO_PROMPT) for file in whole]
    purposes = {"train": "train on", "valid": "validate on"}
    return problems or [
        Problem(str(file.path), 0, f"no row is left to {purposes[name]}")
        for name, file in files.items()
        if not file.rows
    ]


def _thinking(file: EncodedFile, encoder: Encoder) -> bool | None:
    """Whether the adapter is asked to think: as set, or with auto as its rows were where the model knows thinking."""
    if encoder.settings.thinking != "auto":
        return encoder.settings.thinking == "on"
    if not file.reasoned + file.unreasoned or not encoder.chat.thinks:
        return None
    return file.reasoned > 0


def _describe(file: EncodedFile) -> dict[str, Any]:
    """What a manifest says about a file; `answers` is the most that a row holds, 1 where all are single questions."""
    return {
        "file": file.path.name,
        "sha256": sha256(file.path),
        "rows": len(file.rows),
        "tokens": int(file.rows.lengths.sum()),
        "trained_tokens": int(file.rows.trained.sum()),
        "answers": file.answers,
    }
