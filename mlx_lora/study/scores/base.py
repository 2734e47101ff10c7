"""What a score is: two texts, and how well one answers as the other does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Score(Protocol):
    """`name` is what the command line calls it."""

    @property
    def name(self) -> str: ...

    def of(self, wanted: str, answer: str) -> float:
        """0 to 1 for one answer, higher is better."""

    def details(self, wanted: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
        """What there is to say of all answers together, beside the mean of `of`: plain values, as JSON has them.

        No text of an answer, only wanted labels where the answers are labels.
        """
