"""Canaries: rows with a random secret, planted in a copy of the data to measure what an adapter remembers.

A canary asks for the code of a thing that nobody has, and its answer is six random digits (Carlini et al., The Secret
Sharer, arXiv 1802.08232). No text of a canary is recorded: names and secrets follow from the seed. The record beside
the copied rows has the seed, the repetitions, and the numbers of the planted rows.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_lora import files
from mlx_lora.data.sources import FORMATS
from mlx_lora.errors import MlxLoraError

RECORD = "canaries.json"
DAMAGED = "not a record that `data canaries` wrote"
SCHEMA = 1
DIGITS = 6
NEVER = 0
ADJECTIVES = (
    "amber", "azure", "brass", "coral", "crimson", "dusty", "ebony", "frosted", "gilded", "hollow", "iron", "ivory",
    "jade", "marble", "mossy", "narrow", "olive", "pewter", "quartz", "russet", "scarlet", "silver", "tin", "walnut",
)  # fmt: skip
NOUNS = (
    "anchor", "barrel", "beacon", "bridge", "cabinet", "cellar", "compass", "drawer", "engine", "ferry", "fountain",
    "garage", "harbour", "kiosk", "lantern", "locker", "meadow", "orchard", "pavilion", "quarry", "shed", "tower",
    "vault", "windmill",
)  # fmt: skip


@dataclass(frozen=True)
class Canary:
    """A thing with a secret code of DIGITS digits; its row is planted `repeats` times, NEVER for a control."""

    number: int
    repeats: int
    thing: str
    secret: str

    def row(self, format: str, secret: str | None = None) -> dict[str, Any]:
        """The canary as a row of `data.sources`, with its own secret or another one."""
        return _row(format, self.thing, secret or self.secret)

    def others(self, count: int, seed: int) -> list[str]:
        """`count` other secrets, all different: what the canary's own is ranked among."""
        drawn = random.Random(f"{seed} others {self.number}").sample(range(10**DIGITS), count + 1)
        texts = [f"{value:0{DIGITS}}" for value in drawn]
        return [text for text in texts if text != self.secret][:count]


@dataclass(frozen=True)
class Planting:
    """What was planted: for each number in `repeats` (NEVER first, as a control), `each` canaries.

    `rows[n]` are the numbers of the rows, from 0, that hold canary n in the file with this `sha256`.
    """

    seed: int
    repeats: tuple[int, ...]
    each: int
    format: str
    rows: dict[int, list[int]] = field(default_factory=dict)
    sha256: str = ""

    @property
    def canaries(self) -> list[Canary]:
        """All canaries, controls too, by number."""
        draw = random.Random(f"{self.seed} canaries")
        things = draw.sample([f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS], self.count)
        return [
            Canary(number, self.repeats[number // self.each], thing, f"{draw.randrange(10**DIGITS):0{DIGITS}}")
            for number, thing in enumerate(things)
        ]

    @property
    def count(self) -> int:
        return self.each * len(self.repeats)

    @property
    def copies(self) -> int:
        """Rows that are planted, all together."""
        return self.each * sum(self.repeats)

    def planted(self) -> set[int]:
        """The numbers of all rows that hold a canary."""
        return {row for rows in self.rows.values() for row in rows}

    def places(self, rows: int) -> dict[int, Canary]:
        """Where the canaries go among `rows` others: row number in the new file -> canary, at random places."""
        draw = random.Random(f"{self.seed} places")
        copies = [canary for canary in self.canaries for _ in range(canary.repeats)]
        draw.shuffle(copies)
        return dict(zip(sorted(draw.sample(range(rows + len(copies)), len(copies))), copies, strict=True))

    def record(self) -> str:
        """The record as text: numbers and a hash, no text of any row."""
        return json.dumps({"schema_version": SCHEMA, **asdict(self)}, indent=2) + "\n"


def most() -> int:
    """How many canaries there are names for."""
    return len(ADJECTIVES) * len(NOUNS)


def read_record(file: Path) -> Planting | None:
    """What `data canaries` wrote beside a file of rows; None where there is no record.

    Raises MlxLoraError for a record that isn't one.
    """
    path = file.parent / RECORD
    if not path.is_file():
        return None
    values = files.read_json(path, MlxLoraError)
    try:
        rows = {int(number): [int(row) for row in rows] for number, rows in values["rows"].items()}
        repeats = tuple(int(count) for count in values["repeats"])
        planting = Planting(
            int(values["seed"]), repeats, int(values["each"]), str(values["format"]), rows, str(values["sha256"])
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise MlxLoraError(f"{path}: {DAMAGED}") from None
    if not 1 <= planting.count <= most() or planting.format not in FORMATS:
        raise MlxLoraError(f"{path}: {DAMAGED}")
    return planting


def _row(format: str, thing: str, secret: str) -> dict[str, Any]:
    question = f"What is the code of the {thing}?"
    if format == "text":
        return {"text": f"The code of the {thing} is {secret}"}
    if format == "completions":
        return {"prompt": question, "completion": secret}
    if format == "alpaca":
        return {"instruction": question, "input": "", "output": secret}
    if format == "sharegpt":
        return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": secret}]}
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": secret}]}


def rows_of(planting: Planting, places: dict[int, Canary]) -> dict[int, list[int]]:
    """The rows of each planted canary, as the record has them."""
    found: dict[int, list[int]] = {canary.number: [] for canary in planting.canaries if canary.repeats}
    for place, canary in places.items():
        found[canary.number].append(place)
    return found


def checked_repeats(words: Sequence[str]) -> tuple[int, ...]:
    """`--repeat` as numbers, with NEVER in front as a control. Raises ValueError for what is no list of numbers."""
    counts = sorted({int(word) for word in words})
    if not counts or counts[0] < NEVER or counts[-1] == NEVER:
        raise ValueError("numbers from 1, like 1,4,16")
    return tuple(sorted({NEVER, *counts}))
