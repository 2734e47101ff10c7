"""`data convert` and `data redact`: one file of any format as rows of messages, or of text.

The rows are read twice: first for problems, then to be written one by one.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_lora.config import Data
from mlx_lora.data import personal, write
from mlx_lora.data.example import Example
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.data.read import HINT, find_splits, stream
from mlx_lora.errors import DataError, MlxLoraError, Problem

log = logging.getLogger(__name__)


@dataclass
class Converted:
    """What was written. `redacted` counts what was replaced, by kind; None where that wasn't asked for.

    `learn_more` rows learned one answer of several before, and learn all of them as messages.
    """

    out: str
    rows: int = 0
    format: str | None = None
    redacted: dict[str, int] | None = None
    learn_more: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Rows:
    """One file's rows, read anew by each pass."""

    file: Path
    settings: Data
    format: str | None = None
    count: int = 0
    problems: list[Problem] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[int, Example]]:
        """(line, example) of each good row; `format`, `count` and `problems` are of the last pass."""
        rows = stream(self.file, self.settings)
        self.problems, self.count = [], 0
        for item in rows:
            if item.problem is not None:
                self.problems.append(item.problem)
            if item.example is not None:
                self.count += 1
                yield item.line, item.example
        self.format = rows.format
        for note in rows.notes:
            log.info("%s: %s", self.file.name, note)

    def refuse_problems(self) -> None:
        """Raise DataError with every problem that the last pass has met."""
        if self.problems:
            raise DataError(self.problems, hint=HINT)


def one_file(path: str | Path) -> Path:
    """The file that a path stands for. Raises MlxLoraError for a folder with several, which are parted already."""
    splits = find_splits(path)
    if len(splits) > 1:
        raise MlxLoraError(f"{path} has {', '.join(file.name for file in splits.values())}", hint="name one of them")
    return next(iter(splits.values()))


def convert_data(
    path: str | Path, out: Path, settings: Data, *, redact: bool = False, force: bool = False, progress: OnFile = silent
) -> Converted:
    """Write every row of `path` to `out`. Raises DataError with every problem, and then nothing is written."""
    rows = Rows(one_file(path), settings)
    write.check_targets([out], force=force, sources=[rows.file])
    report = Converted(str(out), redacted=None)
    for _, example in rows:
        report.learn_more += write.learns_more(example)
    rows.refuse_problems()
    report.rows, report.format = rows.count, rows.format
    found: Counter[str] = Counter()
    advance = progress(f"writing {out.name}", rows.count)
    with write.files_written([out]) as files:
        for _, example in rows:
            files[out].write(write.line(_redacted(example, found) if redact else example))
            advance()
    report.redacted = dict(found) if redact else None
    return report


def _redacted(example: Example, found: Counter[str]) -> Example:
    """The example without personal data; `found` counts it."""
    if counts := personal.count(personal.texts_of([example.text, example.messages, example.tools])):
        found.update(counts)
        text, messages, tools = personal.redacted([example.text, example.messages, example.tools])
        return replace(example, text=text, messages=tuple(messages), tools=tuple(tools), plain=None)
    return example
