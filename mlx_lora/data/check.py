"""What is wrong with a data path, and what training on it would cost and teach: the look before training.

Every row passes once: problems, sizes, repetition, leaks from train to the other splits, labels, personal data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_lora.config import Data
from mlx_lora.data import personal
from mlx_lora.data.balance import Balance
from mlx_lora.data.duplicates import Duplicates, Pair, Place
from mlx_lora.data.encode import Encoder
from mlx_lora.data.example import Example
from mlx_lora.data.fit import EncodedFile, encode_file, notes
from mlx_lora.data.histogram import Lengths
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.data.read import Item, find_splits, stream
from mlx_lora.data.rows import RowFile
from mlx_lora.data.turns import Weighted
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
    default recipe, filled in by the task. `columns` are the column of each role, `split_rows` the conversations that
    became several rows, `hidden_parts` what the template doesn't show, as `{file, line, part}`; `notes` are for people.
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
    columns: dict[str, str] = field(default_factory=dict)
    split_rows: int = 0
    hidden_parts: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Look:
    """What is seen of rows that pass one by one, and the report of it."""

    def __init__(self) -> None:
        self.duplicates, self.balance, self.lengths = Duplicates(), Balance(), Lengths()
        self.personal: Counter[str] = Counter()
        self.empty_answers = 0
        self.rows: dict[str, RowFile] = {}

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
    look: Look | None = None,
) -> Report:
    """Check every file of a data path. Faulty rows are reported, not raised; a missing path raises DataError.

    `context` is how many positions the model has. `look` is left with what was seen, the encoded rows by split too.
    """
    look = look or Look()
    report, formats, files = Report(), [], find_splits(path)
    for name, file in files.items():
        encoder = None if tokenizer is None else Encoder(tokenizer, settings)
        seen = _seen(file, settings, encoder, partial(look.add, name), progress(f"reading {file.name}", None))
        formats += [seen.format] if seen.format else []
        report.problems += seen.problems
        report.rows += seen.read
        report.files[file.name] = seen.read
        report.columns |= seen.columns
        report.notes += [f"{file.name}: {note}" for note in (*seen.notes, *notes(seen))]
        if encoder is not None:
            _count(report, look, seen)
            look.rows[name] = seen.rows
    report.format = " and ".join(dict.fromkeys(formats)) or None
    faults = [problem.problem for problem in report.problems if problem.line]
    report.empty_rows = sum(map(_empty, faults))
    report.empty_answers = sum(fault.endswith(EMPTY_ANSWERS) for fault in faults)
    look.into(report, files, allow_leaks=allow_leaks, context=context)
    return report


def _seen(
    file: Path,
    settings: Data,
    encoder: Encoder | None,
    look: Callable[[int, Example], None],
    advance: Callable[[], None],
) -> EncodedFile:
    """A file read once: each example is looked at as it passes, and encoded where there is a tokenizer."""

    def passing(item: Item) -> None:
        if item.example is not None:
            look(item.line, item.example)
            advance()

    if encoder is not None:
        return encode_file(file, encoder, on_item=passing)
    rows, seen = stream(file, settings), EncodedFile(settings, file)
    for item in rows:
        passing(item)
        seen.take(item)
    seen.format, seen.columns, seen.notes = rows.format, rows.columns, rows.notes
    return seen


def _empty(problem: str) -> bool:
    return problem.endswith("is empty") or problem.startswith("no token carries loss")


def _says_nothing(message: dict[str, Any]) -> bool:
    """Whether a message is an answer without text or a tool call."""
    return (
        message["role"] == "assistant" and not message.get("tool_calls") and not (message.get("content") or "").strip()
    )


def _count(report: Report, look: Look, encoded: EncodedFile) -> None:
    report.truncated_rows += encoded.truncated
    report.dropped_rows += encoded.dropped
    report.split_rows += encoded.split
    report.hidden_parts += [{"file": str(file), "line": line, "part": part} for file, line, part in encoded.hidden]
    lengths = encoded.rows.lengths
    report.tokens = (report.tokens or 0) + int(lengths.sum())
    report.trained_tokens = (report.trained_tokens or 0) + int(encoded.rows.trained.sum())
    report.longest = max(report.longest or 0, int(lengths.max(initial=0)))
    for length in lengths.tolist():
        look.lengths.add(length)


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


def samples(file: Path, encoder: Encoder, count: int) -> Iterator[list[tuple[str, bool]]]:
    """The first examples as (text, carries loss) runs, for a person to look at; a run for each row of an example."""
    examples = (item.example for item in stream(file, encoder.settings) if item.example)
    for one in encoder.encoded(islice(examples, count)):
        if one.fault:
            yield [(f"({one.fault})", False)]
        for row in one.rows:
            yield _runs(row, encoder)


def _runs(row: Weighted, encoder: Encoder) -> list[tuple[str, bool]]:
    runs: list[tuple[list[int], bool]] = []
    for token, weight in zip(*row, strict=True):
        if not runs or runs[-1][1] != bool(weight):
            runs.append(([], bool(weight)))
        runs[-1][0].append(token)
    return [(encoder.tokenizer.decode(ids), learned) for ids, learned in runs]
