"""What a verdict leaves in the home: verdicts/<name>/verdict.json, with numbers, row numbers and hashes.

No text of any row is part of it, no prompt and no answer, and no name of a label or of a field of JSON answers: every
key is one of those here, and where a value is a word, it is one of those listed. What scores say of single labels and
fields stays on the screen. Whoever wants to see the rows that an adapter fixed or broke reads them from the data file
again, by their numbers. Nothing here imports MLX.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mlx_lora import __version__, files, paths
from mlx_lora.errors import MlxLoraError, nearest

FILE, SCHEMA = "verdict.json", 1
Metric = Literal[
    "loss", "exact", "normalised", "accuracy", "json", "token-f1", "rouge-l", "chrf", "pattern", "numbers", "sql",
    "scorer",
]  # fmt: skip
# What is looked at in answers: how many they are, their mean length in tokens, and the share of each fault.
Look = Literal["answers", "tokens", "refused", "loops", "unfinished", "template"]


class Part(BaseModel):
    """A part of a verdict. Keys that this version doesn't know are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Rows(Part):
    """The rows of a file, by what tells whether it is still the same. `file` is a name without its folder."""

    file: str
    sha256: str
    rows: int


class Drift(Part):
    """KL(base ‖ tuned) in nats a token on the task's rows and on general text, and the mean losses on the latter.

    `loss_general_interval` is the 95 % interval of tuned − base. All but `kl_task` are null where nothing general was
    read.
    """

    kl_task: float
    kl_general: float | None = None
    loss_general_base: float | None = None
    loss_general_tuned: float | None = None
    loss_general_interval: tuple[float, float] | None = None


class SecondOpinion(Part):
    """The mean losses per token on the task's rows, where the verdict goes by a score."""

    base: float
    tuned: float
    difference: float
    interval: tuple[float, float]


class Judged(Part):
    """One adapter against its base. `difference` is tuned − base in the metric's unit, `interval` its 95 % interval.

    `learned` says that the adapter was trained on these rows, so that they say nothing about new ones.
    `fixed` and `broken` count the rows whose numbers `fixed_rows` and `broken_rows` are, from 0 as the file is read.
    `behaviour` has how answers look by prompts (task, general), then side (base, tuned), then what was looked at.
    """

    adapter: str
    verdict: Literal["helped", "hurt", "no_difference", "too_few_rows"]
    sentence: str
    learned: bool = False
    metric: Metric
    base: float
    tuned: float
    difference: float
    interval: tuple[float, float]
    p_value: float
    test: Literal["McNemar", "permutation"]
    detectable: float
    rows: int
    fixed: int
    broken: int
    fixed_rows: list[int]
    broken_rows: list[int]
    loss: SecondOpinion | None = None
    drift: Drift
    behaviour: dict[Literal["task", "general"], dict[Literal["base", "tuned"], dict[Look, float]]] = {}


class Verdict(Part):
    """All of one verdict. `base` is the fingerprint of the base that the adapters say they belong to."""

    schema_version: int = SCHEMA
    mlx_lora: str = __version__
    created: str
    name: str
    model: str
    base: str | None = None
    data: Rows
    general: Rows | None = None
    results: list[Judged]

    def as_dict(self) -> dict[str, Any]:
        """The keys of `verdict --json`."""
        return self.model_dump(mode="json")


def now() -> str:
    """The time as records have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write(verdict: Verdict) -> Path:
    """Write a verdict's record in place of an earlier one of its name; return the file."""
    folder = paths.room("verdicts", verdict.name)
    with paths.written_whole(folder, force=True) as made, paths.created(made / FILE) as stream:
        stream.write((json.dumps(verdict.as_dict(), indent=2) + "\n").encode())
    return folder / FILE


def names() -> list[str]:
    """Names of the verdicts in the home."""
    root = paths.home() / "verdicts"
    return sorted(
        path.parent.name
        for path in root.glob(f"*/{FILE}")
        if paths.is_name(path.parent.name) and files.inside(path, root)
    )


def read(name: str) -> Verdict:
    """The verdict called `name`. Raises MlxLoraError where there is none, or its record is damaged."""
    file = paths.room("verdicts", name) / FILE
    if not file.is_file():
        known = names()
        closest = nearest(name, known) if known else "; there are none yet"
        raise MlxLoraError(f"no verdict {name!r}{closest}", hint="mlx-lora verdict makes one")
    try:
        return Verdict.model_validate(files.read_json(file, MlxLoraError))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise MlxLoraError(f"{file}: {where}: {first['msg']}", hint="make the verdict again") from None
