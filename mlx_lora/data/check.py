"""What is wrong with a data path, and what training on it would cost: every problem, sizes, duplicates, leaks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_lora.config import Data
from mlx_lora.data.encode import Encoder
from mlx_lora.data.example import Example
from mlx_lora.data.fit import EncodedFile, encode_file
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.data.read import Source, find_splits, read
from mlx_lora.errors import Problem


@dataclass
class Report:
    """Over all files of the path. Token counts are None when no tokenizer was given.

    `rows` counts the rows that could be read; the others are among the problems. `truncated_rows` and `dropped_rows`
    are what `too_long` did, `duplicates` the repetitions inside a file, `leaked_rows` the rows of valid and test that
    train has too.
    """

    format: str | None = None
    rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    tokens: int | None = None
    trained_tokens: int | None = None
    longest: int | None = None
    truncated_rows: int = 0
    dropped_rows: int = 0
    empty_rows: int = 0
    duplicates: int = 0
    leaked_rows: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check(path: str | Path, settings: Data, tokenizer: Any = None, *, progress: OnFile = silent) -> Report:
    """Check every file of a data path. Faulty rows are reported, not raised; a missing path raises DataError."""
    report = Report()
    trained_on: set[str] = set()
    formats = []
    for name, file in find_splits(path).items():
        source = read(file, settings)
        formats += [source.format] if source.format else []
        report.problems += source.problems
        report.rows += len(source.examples)
        keys = [_content(example) for example in source.examples]
        report.duplicates += len(keys) - len(set(keys))
        if name == "train":
            trained_on = set(keys)
        else:
            report.leaked_rows += sum(key in trained_on for key in keys)
        if tokenizer is not None:
            encoded = encode_file(file, Encoder(tokenizer, settings), progress(f"reading {file.name}", len(keys)))
            _count(report, encoded)
    report.format = " and ".join(dict.fromkeys(formats)) or None
    report.empty_rows = sum(problem.line > 0 and _empty(problem.problem) for problem in report.problems)
    return report


def _content(example: Example) -> str:
    """What makes two rows the same, whatever format they came in."""
    return json.dumps([example.text, example.messages, example.tools], sort_keys=True)


def _empty(problem: str) -> bool:
    return problem.endswith("is empty") or problem.startswith("no token carries loss")


def _count(report: Report, encoded: EncodedFile) -> None:
    report.problems += [problem for problem in encoded.problems if problem not in report.problems]
    report.truncated_rows += encoded.truncated
    report.dropped_rows += encoded.dropped
    report.tokens = (report.tokens or 0) + int(encoded.rows.lengths.sum())
    report.trained_tokens = (report.trained_tokens or 0) + int(encoded.rows.trained.sum())
    report.longest = max(report.longest or 0, int(encoded.rows.lengths.max(initial=0)))


def samples(source: Source, encoder: Encoder, count: int) -> Iterator[list[tuple[str, bool]]]:
    """The first examples as (text, carries loss) runs, for a person to look at."""
    for example in source.examples[:count]:
        yield _runs(example, encoder)


def _runs(example: Example, encoder: Encoder) -> list[tuple[str, bool]]:
    try:
        rows = encoder.rows(example)
    except ValueError as error:
        return [(f"({error})", False)]
    runs: list[tuple[list[int], bool]] = []
    for tokens, weights in rows:
        for token, weight in zip(tokens, weights, strict=True):
            if not runs or runs[-1][1] != bool(weight):
                runs.append(([], bool(weight)))
            runs[-1][0].append(token)
    return [(encoder.tokenizer.decode(ids), learned) for ids, learned in runs]
