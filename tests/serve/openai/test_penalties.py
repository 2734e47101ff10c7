"""Penalties against their formulas, on logits of a few tokens."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_lora.serve.openai.penalties import AnswerTokens, Bias, Penalties


def penalised(tokens: list[int], logits: list[float], **settings: float) -> list[float]:
    one = Penalties(2, **settings)  # type: ignore[arg-type]
    found = one(mx.array(tokens, mx.int32), mx.array([logits]))
    assert found.tolist() == Penalties(2, **settings)(mx.array(tokens), mx.array([logits])).tolist()  # type: ignore[arg-type]
    return list(found[0].tolist())  # type: ignore[arg-type]


def test_presence_and_frequency_count_the_answer_alone() -> None:
    tokens, logits = [0, 1, 2, 2, 3], [1.0, 1.0, 1.0, 1.0, 1.0]
    assert penalised(tokens, logits, presence=0.5) == [1, 1, 0.5, 0.5, 1]
    assert penalised(tokens, logits, frequency=0.25) == [1, 1, 0.5, 0.75, 1]
    assert penalised(tokens, logits, presence=-0.5, frequency=0.25) == [1, 1, 1, 1.25, 1]
    assert penalised([0, 1], logits, presence=0.5, frequency=1) == logits


def test_repetition_counts_the_prompt_too_and_divides() -> None:
    assert penalised([0, 1, 2], [2.0, -2.0, 0.0, 2.0], repetition=2) == [1, -4, 0, 2]


def test_virtual_tokens_belong_to_the_prompt() -> None:
    tokens = [-1, -2, 0, 1, 2]
    assert AnswerTokens(2)(mx.array(tokens)) == [2]
    assert penalised(tokens, [1.0, 1.0, 1.0], frequency=1, repetition=2) == pytest.approx([0.5, 0.5, -0.5])


def test_a_bias_is_added() -> None:
    found = Bias({2: 5.0, 0: -1.0})(mx.array([1]), mx.array([[0.0, 0.0, 0.0]]))
    assert found.tolist() == [[-1, 0, 5]]
