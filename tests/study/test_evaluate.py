"""Evaluation: exact match counts what generation says, loss is that of training, one load serves all."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_lora.config import Data
from mlx_lora.data.batch import collate
from mlx_lora.data.rows import Row
from mlx_lora.errors import DataError
from mlx_lora.models.load import LoadedModel
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.serve.answer import prompt_tokens
from mlx_lora.serve.engine import Engine
from mlx_lora.study.evaluate import Questions, evaluate, questions
from mlx_lora.train.objectives.likelihood import Loss, as_arrays

PROMPTS = ("one", "a second", "and three", "4")


def test_exact_match_counts_the_answers_that_generation_gives(
    tiny: LoadedModel, write_rows: Callable[..., Path]
) -> None:
    engine = Engine(tiny)
    rows = []
    for index, prompt in enumerate(PROMPTS):
        tokens = prompt_tokens(tiny.tokenizer, [{"role": "user", "content": prompt}])
        says = tiny.tokenizer.decode(list(engine.stream(tokens, max_tokens=6)))
        rows.append({"prompt": prompt, "completion": says if index else "something else"})
    asked = questions(str(write_rows(rows)), Data(), tiny.tokenizer, exact=True)
    result = evaluate(engine, None, asked, max_tokens=6)
    assert result.exact_match == 3 / 4


def test_loss_is_the_mean_over_tokens_of_all_rows(tiny: LoadedModel, write_rows: Callable[..., Path]) -> None:
    rows = [{"prompt": prompt, "completion": prompt * 3} for prompt in PROMPTS * 3]
    asked = questions(str(write_rows(rows)), Data(), tiny.tokenizer, exact=False)
    result = evaluate(Engine(tiny), None, asked)
    total = sum(Loss(take_apart(tiny.model))(as_arrays(collate([row]))).item() for row in asked.rows)
    assert result.tokens == sum(row.trained for row in asked.rows) and result.exact_match is None
    assert result.loss == pytest.approx(total / result.tokens, rel=1e-5)


def test_the_test_file_is_what_is_evaluated(tiny: LoadedModel, write_rows: Callable[..., Path]) -> None:
    for count, name in ((5, "train"), (3, "valid"), (2, "test")):
        folder = write_rows([{"prompt": "x", "completion": "y"}] * count, name=f"{name}.jsonl").parent
    assert len(questions(str(folder), Data(), tiny.tokenizer, exact=False).rows) == 2


def test_rows_are_asked_with_their_own_system_lines(tiny: LoadedModel, write_rows: Callable[..., Path]) -> None:
    turns = [{"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "yes"))]
    led = [{"role": "system", "content": "be brief"}, *turns]
    asked = questions(str(write_rows([{"messages": led}, {"messages": turns}])), Data(), tiny.tokenizer, exact=True)
    says = ["be brief" in tiny.tokenizer.decode(prompt) for prompt in asked.prompts]
    assert says == ["be brief" in tiny.tokenizer.decode(row.tokens.tolist()) for row in asked.rows] == [True, False]


def test_plain_text_has_no_answer_to_match(tiny: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "just text"}) + "\n")
    with pytest.raises(DataError, match="--exact"):
        questions(str(tmp_path), Data(), tiny.tokenizer, exact=True)


class Length:
    """The share of the wanted length that an answer has."""

    name = "length"

    def of(self, wanted: str, answer: str) -> float:
        return min(len(answer) / len(wanted), 1.0)

    def details(self, wanted: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
        return {"rows": len(wanted), "longest": max(map(len, answers))}


def test_each_row_has_the_loss_that_it_has_alone_and_they_sum_to_the_mean(
    tiny: LoadedModel, write_rows: Callable[..., Path]
) -> None:
    rows = [{"prompt": prompt, "completion": prompt * 5} for prompt in PROMPTS * 4]
    rows.insert(4, {"prompt": "long", "completion": "x" * 400})
    settings = Data(max_seq_length=128, too_long="drop")
    asked = questions(str(write_rows(rows)), settings, tiny.tokenizer, exact=False)
    result = evaluate(Engine(tiny), None, asked)
    assert [row.number for row in result.each] == [*range(4), *range(5, 17)]  # row 4 was too long
    loss = Loss(take_apart(tiny.model))
    for row, one in zip(asked.rows, result.each, strict=True):
        assert one.loss == pytest.approx(loss(as_arrays(collate([row]))).item(), rel=2e-6)
        assert (one.tokens, one.answer, one.score) == (row.trained, None, None)
    assert sum(one.loss for one in result.each) / result.tokens == pytest.approx(result.loss, rel=1e-6)


def test_rows_of_one_conversation_are_one_result(tiny: LoadedModel) -> None:
    rows = [Row(np.array([5, 6, 7, 8]), np.array([0, 0, 1, 1])) for _ in range(4)]
    result = evaluate(Engine(tiny), None, Questions(rows, [], [], [], [2, 2, 2, 5]))
    assert [(one.number, one.tokens) for one in result.each] == [(2, 6), (5, 2)]
    assert result.each[0].loss == pytest.approx(3 * result.each[1].loss) and result.rows == 4


def test_a_score_sees_the_answers_that_exact_match_counts(tiny: LoadedModel, write_rows: Callable[..., Path]) -> None:
    rows = [{"prompt": prompt, "completion": prompt * 4} for prompt in PROMPTS]
    asked = questions(str(write_rows(rows)), Data(), tiny.tokenizer, exact=True)
    result = evaluate(Engine(tiny), None, asked, score=Length(), max_tokens=6)
    said = [one.answer or "" for one in result.each]
    prompts = [prompt_tokens(tiny.tokenizer, [{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    engine = Engine(tiny)
    assert said == [tiny.tokenizer.decode(list(engine.stream(tokens, max_tokens=6))).strip() for tokens in prompts]
    shares = [min(len(answer) / len(prompt * 4), 1) for prompt, answer in zip(PROMPTS, said, strict=True)]
    assert [one.score for one in result.each] == shares and result.score == pytest.approx(np.mean(shares))
    assert [one.wanted for one in result.each] == [prompt * 4 for prompt in PROMPTS]
    assert result.score_name == "length" and result.details == {"rows": 4, "longest": max(map(len, said))}
    assert "each" not in result.as_dict() and result.as_dict()["exact_match"] == 0


def test_the_first_rows_have_the_prompts_whose_rows_they_are(tiny: LoadedModel) -> None:
    """Two conversations of two rows each, cut inside the second one."""
    rows = [Row(np.array([5, 6, 7, 8]), np.array([0, 0, 1, 1])) for _ in range(4)]
    asked = Questions(rows, [[5, 6], [7]], ["x", "y"], [1, 3], [0, 0, 1, 1])
    first = asked.first(3)
    assert (len(first.rows), first.prompts, first.answers, first.last_rows) == (3, [[5, 6]], ["x"], [1])
    result = evaluate(Engine(tiny), None, first, score=Length(), max_tokens=2)
    assert [(row.number, row.tokens, row.wanted) for row in result.each] == [(0, 4, "x"), (1, 2, None)]
