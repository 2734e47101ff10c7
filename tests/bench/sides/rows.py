"""Rows as every side can read them: lists of token ids and loss weights, without MLX and without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class PlainRow:
    """`tokens` and, for each, the weight of predicting it: 0s of the prompt, then 1s."""

    tokens: list[int]
    weights: list[float]

    @property
    def first(self) -> int:
        """Index of the first token with loss."""
        return next(index for index, weight in enumerate(self.weights) if weight)

    @property
    def trained(self) -> int:
        return sum(weight != 0 for weight in self.weights)


def read(file: str) -> list[PlainRow]:
    return [PlainRow(tokens, weights) for tokens, weights in json.loads(Path(file).read_text())]


def random(vocabulary: int, count: int, length: int, mask: str) -> list[PlainRow]:
    """Random rows of `length` positions, so `length` + 1 tokens; loss on all of them or on the last quarter."""
    tokens = np.random.default_rng(0).integers(1, vocabulary, (count, length + 1)).tolist()
    trained = length if mask == "all" else length // 4
    return [PlainRow(row, [0.0] * (length + 1 - trained) + [1.0] * trained) for row in tokens]
