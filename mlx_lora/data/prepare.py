"""A data path and settings become train and validation rows, or one error listing every fault.

When there is no validation file, a fraction of the training rows is set aside: which ones is a function of the seed
and the number of rows alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_lora.config import Data
from mlx_lora.data.encode import Encoded, Encoder, Row
from mlx_lora.data.read import HINT, Source, find_splits, read, sha256
from mlx_lora.data.virtual import Virtual
from mlx_lora.errors import DataError, Problem

NO_PROMPT = "an infix goes between prompt and answer, and rows here are learned whole; adapter.position=prefix works"
OnFile = Callable[[str, int], Callable[[], None]]


@dataclass
class Prepared:
    """Rows ready to batch; `files` describes where they came from, without any of their text."""

    train: list[Row]
    valid: list[Row]
    format: str
    truncated: int
    dropped: int
    files: list[dict[str, Any]] = field(default_factory=list)


def silent(name: str, total: int) -> Callable[[], None]:
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
    rows: dict[str, list[Row]] = {"train": [], "valid": []}
    problems: list[Problem] = []
    prepared = Prepared([], [], "", 0, 0)
    for name in ("train", "valid"):
        if name not in splits:
            continue
        source = read(splits[name], settings)
        encoded = encoder.encode(source, progress(f"reading {splits[name].name}", len(source.examples)))
        problems += source.problems + encoded.problems
        if virtual and virtual.position == "infix" and _without_prompt(source, settings):
            problems.append(Problem(str(splits[name]), 0, NO_PROMPT))
        rows[name] = [virtual.row(row) for row in encoded.rows] if virtual else encoded.rows
        prepared.truncated += encoded.truncated
        prepared.dropped += encoded.dropped
        prepared.format = prepared.format or source.format or ""
        prepared.files.append(_describe(source, encoded))
    if problems := problems or _left_empty(splits, rows):
        raise DataError(problems, hint=HINT)
    prepared.train, prepared.valid = rows["train"], rows["valid"]
    if "valid" not in splits:
        prepared.train, prepared.valid = set_aside(rows["train"], settings.valid_fraction, seed)
    return prepared


def set_aside(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows into (train, valid); at least one row stays on each side when a fraction is asked for."""
    if fraction == 0 or len(rows) < 2:
        return rows, []
    count = min(max(round(len(rows) * fraction), 1), len(rows) - 1)
    chosen = set(np.random.default_rng([seed, len(rows)]).permutation(len(rows))[:count].tolist())
    train = [row for index, row in enumerate(rows) if index not in chosen]
    return train, [row for index, row in enumerate(rows) if index in chosen]


def _left_empty(splits: dict[str, Path], rows: dict[str, list[Row]]) -> list[Problem]:
    """Files of which no row is left once too long ones were dropped."""
    purposes = {"train": "train on", "valid": "validate on"}
    empty = [name for name in purposes if name in splits and not rows[name]]
    return [Problem(str(splits[name]), 0, f"no row is left to {purposes[name]}") for name in empty]


def _without_prompt(source: Source, settings: Data) -> bool:
    """Whether any row carries loss from its beginning."""
    return settings.mask == "all" or any(example.text is not None for example in source.examples)


def _describe(source: Source, encoded: Encoded) -> dict[str, Any]:
    """What a manifest says about a file; `answers` is the most that a row holds, 1 where all are single questions."""
    rows = encoded.rows
    answers = (sum(message["role"] == "assistant" for message in example.messages) for example in encoded.examples)
    return {
        "file": source.file.name,
        "sha256": sha256(source.file),
        "rows": len(rows),
        "tokens": sum(len(row) for row in rows),
        "trained_tokens": sum(row.trained for row in rows),
        "answers": max(answers, default=0),
    }
