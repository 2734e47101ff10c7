"""Evaluation: exact match counts what generation says, loss is that of training, one load serves all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_lora.config import Data
from mlx_lora.data.batch import collate
from mlx_lora.errors import DataError
from mlx_lora.models.load import LoadedModel
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.serve.answer import prompt_tokens
from mlx_lora.serve.engine import Engine
from mlx_lora.study.evaluate import evaluate, questions
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
