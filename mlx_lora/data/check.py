"""What is wrong with a data path, and what training on it would cost and teach: the look before training.

Every row passes once: problems, sizes, repetition, leaks from train to the other splits, labels, personal data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_lora.config import Data
from mlx_lora.data import personal
from mlx_lora.data.balance import Balance
from mlx_lora.data.duplicates import Duplicates, Pair, Place
from mlx_lora.data.encode import Encoded, Encoder
from mlx_lora.data.example import Example
from mlx_lora.data.histogram import Lengths
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.data.read import Source, find_splits, read
from mlx_lora.errors import Problem

EMPTY_ANSWERS = ("(assistant) is empty", "'completion' is empty", "'output' is empty")


@dataclass
class Report:
    """Over all files of the path. What counts tokens is None when no tokenizer was given.

    `rows` counts the rows that could be read, `files` by file; the others are among the problems. `truncated_rows` and
    `dropped_rows` are what `too_long` did, `duplicates` the repetitions inside a file, `leaked_rows` the rows of valid
    and test that train has too. `histogram` has `{low, high, rows}` by tokens, `typical` the median and what 95 % of
    the rows don't exceed. `context` are the model's positions, None where it doesn't say.
    `same_prompt_different_answers` counts prompts, and has the first in `same_prompt_examples`, pairs of
    `{file, line}`. `near_duplicates` counts rows that are much like an earlier one among the rows sampled. `labels`
    are rows by answer where answers are few and short, `personal` places by kind. `plan` is what `plan` says of the
    default recipe, filled in by the task.
    """

    format: str | None = None
    rows: int = 0
    files: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    tokens: int | None = None
    trained_tokens: int | None = None
    longest: int | None = None
    typical: list[int] | None = None
    histogram: list[dict[str, int]] | None = None
    context: int | None = None
    over_context: int | None = None
    truncated_rows: int = 0
    dropped_rows: int = 0
    empty_rows: int = 0
    empty_answers: int = 0
    duplicates: int = 0
    leaked_rows: int = 0
    same_prompt_different_answers: int = 0
    same_prompt_examples: list[list[dict[str, Any]]] = field(default_factory=list)
    near_duplicates: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, int] | None = None
    personal: dict[str, int] = field(default_factory=dict)
    plan: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Look:
    """What is seen of rows that pass one by one, and the report of it."""

    def __init__(self) -> None:
        self.duplicates, self.balance, self.lengths = Duplicates(), Balance(), Lengths()
        self.personal: Counter[str] = Counter()
        self.empty_answers = 0

    def add(self, split: str, line: int, example: Example) -> None:
        """Take note of a row, which is not kept."""
        self.duplicates.add(split, line, example)
        self.balance.add(example)
        self.personal.update(personal.count(personal.texts_of([example.text, example.messages])))
        self.empty_answers += any(map(_says_nothing, example.messages))

    def into(self, report: Report, files: dict[str, Path], *, allow_leaks: bool, context: int | None) -> None:
        """Write what was seen into the report; leaks are problems unless they were agreed to."""
        repeated = self.duplicates.report()
        near = repeated.near
        report.duplicates, report.leaked_rows = repeated.duplicates, sum(repeated.leaked.values())
        for split, count in repeated.leaked.items() if not allow_leaks else ():
            report.problems.append(_leak(files, split, count, repeated.leaked_examples[split]))
        report.same_prompt_different_answers = repeated.other_answers
        report.same_prompt_examples = _shown(repeated.other_answers_examples, files)
        report.near_duplicates = {
            "rows_sampled": near.rows_sampled,
            "pairs": near.pairs,
            "across_splits": near.across,
            "examples": _shown(near.examples, files),
        }
        report.labels = self.balance.labels()
        report.personal = {kind: self.personal[kind] for kind in personal.FINDERS}
        report.empty_answers += self.empty_answers
        median = self.lengths.share(0.5)
        if report.tokens is not None and median is not None:
            report.typical = [median, self.lengths.share(0.95) or median]
            report.histogram = [bin._asdict() for bin in self.lengths.bins()]
            report.context = context
            report.over_context = self.lengths.over(context) if context else None


def check(
    path: str | Path,
    settings: Data,
    tokenizer: Any = None,
    *,
    progress: OnFile = silent,
    allow_leaks: bool = False,
    context: int | None = None,
) -> Report:
    """Check every file of a data path. Faulty rows are reported, not raised; a missing path raises DataError.

    `context` is how many positions the model has.
    """
    report, look, formats, files = Report(), Look(), [], find_splits(path)
    for name, file in files.items():
        source = read(file, settings)
        formats += [source.format] if source.format else []
        report.problems += source.problems
        report.rows += len(source.examples)
        report.files[file.name] = len(source.examples)
        advance = progress(f"looking at {file.name}", len(source.examples))
        for line, example in zip(source.lines, source.examples, strict=True):
            look.add(name, line, example)
            advance()
        if tokenizer is not None:
            encoded = Encoder(tokenizer, settings).encode(source, progress(f"reading {file.name}", len(source.lines)))
            _count(report, look, encoded)
    report.format = " and ".join(dict.fromkeys(formats)) or None
    faults = [problem.problem for problem in report.problems if problem.line]
    report.empty_rows = sum(map(_empty, faults))
    report.empty_answers = sum(fault.endswith(EMPTY_ANSWERS) for fault in faults)
    look.into(report, files, allow_leaks=allow_leaks, context=context)
    return report


def _empty(problem: str) -> bool:
    return problem.endswith("is empty") or problem.startswith("no token carries loss")


def _says_nothing(message: dict[str, Any]) -> bool:
    """Whether a message is an answer without text or a tool call."""
    return (
        message["role"] == "assistant" and not message.get("tool_calls") and not (message.get("content") or "").strip()
    )


def _count(report: Report, look: Look, encoded: Encoded) -> None:
    report.problems += encoded.problems
    report.truncated_rows += encoded.truncated
    report.dropped_rows += encoded.dropped
    report.tokens = (report.tokens or 0) + sum(len(row) for row in encoded.rows)
    report.trained_tokens = (report.trained_tokens or 0) + sum(row.trained for row in encoded.rows)
    report.longest = max([report.longest or 0, *(len(row) for row in encoded.rows)])
    for row in encoded.rows:
        look.lengths.add(len(row))


def _leak(files: dict[str, Path], split: str, count: int, pairs: list[Pair]) -> Problem:
    lines = ", ".join(f"line {pair.row.line} is its line {pair.earlier.line}" for pair in pairs)
    more = ", …" if count > len(pairs) else ""
    rows = "1 row is" if count == 1 else f"{count} rows are"
    return Problem(
        str(files[split]),
        pairs[0].row.line,
        f"{rows} in {files['train'].name} too: {lines}{more}; remove them, or agree to it by --allow-leaks",
    )


def _shown(pairs: list[Pair], files: dict[str, Path]) -> list[list[dict[str, Any]]]:
    """Pairs of `{file, line}`, the earlier row first."""

    def shown(place: Place) -> dict[str, Any]:
        return {"file": str(files[place.split]), "line": place.line}

    return [[shown(pair.earlier), shown(pair.row)] for pair in pairs]


def samples(source: Source, encoder: Encoder, count: int) -> Iterator[list[tuple[str, bool]]]:
    """The first examples as (text, carries loss) runs, for a person to look at."""
    for example in source.examples[:count]:
        yield _runs(example, encoder)


def _runs(example: Example, encoder: Encoder) -> list[tuple[str, bool]]:
    try:
        tokens, weights = encoder.tokens(example)
    except ValueError as error:
        return [(f"({error})", False)]
    runs: list[tuple[list[int], bool]] = []
    for token, weight in zip(tokens, weights, strict=True):
        if not runs or runs[-1][1] != bool(weight):
            runs.append(([], bool(weight)))
        runs[-1][0].append(token)
    return [(encoder.tokenizer.decode(ids), learned) for ids, learned in runs]
