"""What a score is: two texts, and how well one answers as the other does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

# Seconds for what comes from elsewhere and may not end: a query, an expression, a scorer.
QUERY_SECONDS, PATTERN_SECONDS, SCORER_SECONDS = 2.0, 0.2, 10.0


class Score(Protocol):
    """`name` is what the command line calls it."""

    @property
    def name(self) -> str: ...

    def of(self, wanted: str, answer: str) -> float:
        """0 to 1 for one answer, higher is better."""

    def details(self, wanted: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
        """What there is to say of all answers together, beside the mean of `of`: plain values, as JSON has them.

        Numbers, and the names of labels and of JSON fields that are wanted; no other text.
        """


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean, 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def f1(right: float, wanted: float, answered: float) -> float:
    """2 · right / (wanted + answered), the harmonic mean of precision and recall; 1 where there is nothing to find."""
    return 2 * right / (wanted + answered) if wanted + answered else 1.0
