"""Accuracy, with confusion and each class's precision, recall and F1.

The labels are the wanted answers. `study.labels` takes a model's answer as the label that it finds most likely; what is
generated freely counts as a label where it is one apart from its form, and as none of them otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lora.study.scores.base import Score, f1, mean
from mlx_lora.study.scores.match import normalised

# What an answer counts as that is none of the labels.
OTHER = "(other)"


@dataclass(frozen=True)
class Accuracy:
    """The share of answers that are the right one of `labels`."""

    labels: tuple[str, ...]
    name: str = "accuracy"

    def of(self, wanted: str, answer: str) -> float:
        return float(self.label(answer) == wanted.strip())

    def label(self, answer: str) -> str:
        """The label that an answer is."""
        if answer.strip() in self.labels:
            return answer.strip()
        alike = [label for label in self.labels if normalised(label) == normalised(answer)]
        return alike[0] if len(alike) == 1 else OTHER

    def details(self, wanted: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
        """`confusion[wanted][answered]` counts rows; `macro_f1` is over the labels that are wanted or answered.

        A label that was never answered has precision 0, one that was never wanted recall 0, as in scikit-learn.
        `most_frequent` is the accuracy of always answering the most frequent label.
        """
        pairs = Counter((right.strip(), self.label(answer)) for right, answer in zip(wanted, answers, strict=True))
        rows, columns = Counter[str](), Counter[str]()
        for (right, answer), count in pairs.items():
            rows[right] += count
            columns[answer] += count
        classes = {
            label: {
                "precision": pairs[label, label] / columns[label] if columns[label] else 0.0,
                "recall": pairs[label, label] / rows[label] if rows[label] else 0.0,
                "f1": f1(pairs[label, label], rows[label], columns[label]),
                "rows": rows[label],
            }
            for label in self.labels
            if rows[label] or columns[label]
        }
        answered = [*self.labels, *([OTHER] if columns[OTHER] else [])]
        return {
            "confusion": {right: {answer: pairs[right, answer] for answer in answered} for right in self.labels},
            "classes": classes,
            "macro_f1": mean([one["f1"] for one in classes.values()]),
            "most_frequent": max(rows.values()) / len(wanted),
        }


@dataclass(frozen=True)
class Applied:
    """A score of the answers that it was given: its value for each, their mean, and what else it says."""

    answers: list[str]
    values: list[float]
    details: dict[str, Any]

    @property
    def mean(self) -> float:
        return mean(self.values)


def applied(score: Score, wanted: Sequence[str], said: list[str] | None, likely: list[str] | None) -> Applied:
    """A score of what was generated; accuracy takes the likeliest labels where they are known.

    `details["answers"]` says which of them it was.
    """
    by_likelihood = isinstance(score, Accuracy) and likely is not None
    answers = (likely if by_likelihood else said) or []
    details = score.details(wanted, answers)
    if isinstance(score, Accuracy):
        details["answers"] = "likeliest" if by_likelihood else "generated"
    return Applied(answers, [score.of(*pair) for pair in zip(wanted, answers, strict=True)], details)


def answered(scores: Sequence[Score], exact: bool) -> int:
    """How often a prompt is answered for these scores: by labels, by generation, or by both."""
    labelled = [isinstance(score, Accuracy) for score in scores]
    return any(labelled) + (exact or not scores or not all(labelled))
