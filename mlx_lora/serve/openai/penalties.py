"""Changes to the logits of one row that its request asks for: biases, and penalties for tokens that came before.

Everything follows from the row's tokens. Arrays of MLX are made in the thread that generates, when they are needed.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np


class AnswerTokens:
    """The answer in all tokens of a row: what follows its prompt of `length` tokens.

    Virtual tokens of prompt tuning, which are below 0, stand in the prompt and don't count.
    """

    def __init__(self, length: int):
        self._length = length
        self._start: int | None = None

    def start(self, tokens: mx.array) -> int:
        """Where the answer begins in tokens (T,)."""
        if self._start is None:
            virtual = int((tokens < 0).sum().item())
            self._start = self._length + virtual
        return self._start

    def __call__(self, tokens: mx.array) -> list[int]:
        answer: list[int] = tokens[self.start(tokens) :].tolist()  # type: ignore[assignment]
        return answer


class Bias:
    """Adds to the logits of some tokens."""

    def __init__(self, biases: Mapping[int, float]):
        self._tokens = np.array(sorted(biases), np.int32)
        self._values = np.array([biases[token] for token in sorted(biases)], np.float32)

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        return logits.at[:, mx.array(self._tokens)].add(mx.array(self._values).astype(logits.dtype))


class Penalties:
    """`presence` once for each token of the answer, `frequency` as often as it came (OpenAI's); `repetition` divides.

    logits (1, V) of the tokens so far: a positive logit is divided by `repetition`, a negative one multiplied, for
    tokens of the prompt too (Keskar et al., 1909.05858). Then presence + frequency · count is taken off.
    """

    def __init__(self, length: int, *, presence: float = 0.0, frequency: float = 0.0, repetition: float = 1.0):
        self._answer = AnswerTokens(length)
        self._presence, self._frequency, self._repetition = presence, frequency, repetition

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        start = self._answer.start(tokens)
        every = np.array(tokens)
        if self._repetition != 1:
            seen = mx.array(np.unique(every[every >= 0]).astype(np.int32))
            factors = mx.where(logits[:, seen] > 0, 1 / self._repetition, self._repetition).astype(logits.dtype)
            logits = logits.at[:, seen].multiply(factors)
        if (self._presence or self._frequency) and len(every) > start:
            ids, counts = np.unique(every[start:], return_counts=True)
            taken = mx.array((self._presence + self._frequency * counts).astype(np.float32))
            logits = logits.at[:, mx.array(ids.astype(np.int32))].subtract(taken.astype(logits.dtype))
        return logits
