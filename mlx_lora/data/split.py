"""Which of train, valid and test a row belongs to: a function of its content and a seed, and of nothing else.

A row's group is what its conversation begins with, up to the first thing that the user says. So exact duplicates, the
same question with different answers, and a conversation and its continuation are on one side, and none can leak to
another. Adding rows to a file moves none that were there.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from dataclasses import dataclass

from mlx_lora.data.example import Example

SPLITS = ("train", "valid", "test")
RANGE = 2**64


@dataclass(frozen=True)
class Fractions:
    """Shares of the rows for valid and test; the rest is for train. Raises ValueError unless some is left."""

    valid: float = 0.1
    test: float = 0.1

    def __post_init__(self) -> None:
        if not (0 <= self.valid < 1 and 0 <= self.test < 1 and self.valid + self.test < 1):
            raise ValueError(
                f"valid {self.valid:g} and test {self.test:g} leave nothing to train on: "
                "each is from 0 to below 1, and so is their sum"
            )

    @property
    def wanted(self) -> tuple[str, ...]:
        """The splits that are to have rows."""
        return tuple(name for name, share in zip(SPLITS, (1, self.valid, self.test), strict=True) if share)


def group(example: Example) -> int:
    """The group of a row, as 8 bytes: equal for rows that must not be parted."""
    said = [[message["role"], message.get("content")] for message in beginning(example)]
    text = json.dumps([example.text, said], sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def beginning(example: Example) -> tuple[dict[str, object], ...]:
    """The messages of a conversation up to the first of the user, or all of them where the user says nothing."""
    for index, message in enumerate(example.messages):
        if message["role"] == "user":
            return example.messages[: index + 1]
    return example.messages


def side(group: int, fractions: Fractions, seed: int = 0) -> str:
    """The split of a group: its hash with the seed falls into one of three parts of a range."""
    mixed = hashlib.blake2b(group.to_bytes(8, "little") + seed.to_bytes(16, "little"), digest_size=8).digest()
    place = int.from_bytes(mixed, "little")
    if place < fractions.test * RANGE:
        return "test"
    return "valid" if place < (fractions.test + fractions.valid) * RANGE else "train"


class Assignment:
    """The first pass over the rows: which groups there are, in 8 bytes a row, and where the rows go."""

    def __init__(self, fractions: Fractions, seed: int = 0) -> None:
        self.fractions, self.seed = fractions, seed
        self._groups = array("Q")

    def add(self, example: Example) -> str:
        """Take note of a row; the split it goes to."""
        self._groups.append(group(example))
        return side(self._groups[-1], self.fractions, self.seed)

    @property
    def groups(self) -> int:
        return len(set(self._groups))

    def rows(self, seed: int | None = None) -> dict[str, int]:
        """Rows by split, with this seed or another."""
        seed = self.seed if seed is None else seed
        sides: Counter[str] = Counter()
        for key, rows in Counter(self._groups).items():
            sides[side(key, self.fractions, seed)] += rows
        return {name: sides[name] for name in self.fractions.wanted}

    def missing(self, seed: int | None = None) -> list[str]:
        """Splits that were asked for and would have no row."""
        return [name for name, rows in self.rows(seed).items() if not rows]

    def other_seed(self, most: int = 100) -> int | None:
        """The first seed from 0 that leaves no split empty, where one of so many does."""
        if self.groups < len(self.fractions.wanted):
            return None
        return next((seed for seed in range(most) if not self.missing(seed)), None)
