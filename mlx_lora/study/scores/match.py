"""Scores that are 0 or 1: the same text, the same text apart from its form, a regular expression, the same numbers."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import regex

from mlx_lora.errors import MlxLoraError
from mlx_lora.study.scores.base import PATTERN_SECONDS

# Punctuation in front of a digit belongs to a number: 3.5, -2, 1,000, 10:30, 1/2.
BEFORE_DIGITS = frozenset(".,:/-\N{MINUS SIGN}")
NUMBER = re.compile(r"(?<![\w.])[+\-\u2212]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))(?:[eE][+-]?\d{1,4})?")


@dataclass(frozen=True)
class Exact:
    """The same text, apart from white space around it."""

    name: str = "exact"

    def of(self, wanted: str, answer: str) -> float:
        return float(wanted.strip() == answer.strip())

    def details(self, wanted: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Normalised:
    """The same text as `normalised` has it: case, punctuation, white space and forms of characters don't count."""

    name: str = "normalised"

    def of(self, wanted: str, answer: str) -> float:
        return float(normalised(wanted) == normalised(answer))

    def details(self, wanted: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
        return {"exact_match": sum(Exact().of(*pair) for pair in zip(wanted, answers, strict=True)) / len(wanted)}


def normalised(text: str) -> str:
    """Unicode NFKC, without case, punctuation (category P, except inside numbers and %), and repeated white space.

    A text of nothing but punctuation keeps it.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    kept = "".join(
        character
        for place, character in enumerate(folded)
        if character == "%"
        or not unicodedata.category(character).startswith("P")
        or (character in BEFORE_DIGITS and folded[place + 1 : place + 2].isdigit())
    )
    return " ".join(kept.split()) or " ".join(folded.split())


class Pattern:
    """Whether a regular expression is found in the answer; what its groups hold has to be what they hold in the wanted
    answer, where it has groups and is found there.

    A search that takes longer than PATTERN_SECONDS finds nothing, and is counted.
    """

    name = "pattern"

    def __init__(self, pattern: str):
        try:
            self._pattern = regex.compile(pattern)
        except regex.error as error:
            raise MlxLoraError(f"--pattern {pattern!r} is not a regular expression: {error}") from None
        self._found: dict[str, Any] = {}

    def of(self, wanted: str, answer: str) -> float:
        found, right = self._search(answer), self._search(wanted)
        return float(bool(found) and (not right or found.groups() == right.groups()))

    def details(self, wanted: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
        slow = sum(self._search(answer) is False for answer in answers)
        return {"wanted_found": sum(bool(self._search(one)) for one in wanted), "timed_out": slow}

    def _search(self, text: str) -> Any:
        """The match, None where there is none, False where the search takes too long."""
        if text not in self._found:
            try:
                self._found[text] = self._pattern.search(text, timeout=PATTERN_SECONDS)
            except TimeoutError:
                self._found[text] = False
        return self._found[text]


@dataclass(frozen=True)
class Numbers:
    """The same numbers within a tolerance: an answer's last ones are compared with all of the wanted answer.

    `tolerance` is the largest difference, or with `relative` the largest share of the wanted number.
    """

    tolerance: float = 0.0
    relative: bool = False
    name: str = "numbers"

    def of(self, wanted: str, answer: str) -> float:
        right, found = numbers(wanted), numbers(answer)
        if not right:
            return Normalised().of(wanted, answer)
        last = found[-len(right) :]
        return float(len(last) == len(right) and all(map(self._near, right, last)))

    def _near(self, wanted: Decimal, answer: Decimal) -> bool:
        most = Decimal(str(self.tolerance))
        return abs(answer - wanted) <= (most * abs(wanted) if self.relative else most)

    def details(self, wanted: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
        """`numbers` answers have enough numbers; the mean and largest distance are over these."""
        pairs = [(numbers(right), numbers(answer)) for right, answer in zip(wanted, answers, strict=True)]
        enough = [(right, found[-len(right) :]) for right, found in pairs if right and len(found) >= len(right)]
        distances = [float(max(map(abs, map(Decimal.__sub__, found, right)))) for right, found in enough]
        far = {"mean_error": sum(distances) / len(distances), "largest_error": max(distances)} if distances else {}
        return {"tolerance": self.tolerance, "relative": self.relative, "numbers": len(enough), **far}


def numbers(text: str) -> list[Decimal]:
    """The numbers of a text, as 3, -2.5, 1,000 or 6e23; those inside words (B2, v1.2) aren't numbers."""
    found = []
    for match in NUMBER.finditer(text):
        try:
            found.append(Decimal(match.group().replace(",", "").replace("\N{MINUS SIGN}", "-")))
        except InvalidOperation:
            continue
    return found
