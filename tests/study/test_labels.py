"""Labels by likelihood: against the model's own logits of each label's row by itself, and the whole way from a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.adapters.attach import put
from mlx_lora.config import Data
from mlx_lora.data.rows import Row
from mlx_lora.models.load import LoadedModel
from mlx_lora.serve.engine import Engine
from mlx_lora.study import labels as study
from mlx_lora.study.evaluate import Questions, evaluate_each, questions
from mlx_lora.study.labels import label_tokens, log_likelihoods
from mlx_lora.study.scores.choose import choose
from mlx_lora.study.scores.labels import Accuracy
from mlx_lora.study.scores.match import Exact
from tests.models.tiny import mixed, plain
from tests.models.tiny.build import build
from tests.serve.requests import prompt, random_adapter

CONFIGS = {**plain.CONFIGS, **mixed.CONFIGS}
# A kind each: plain attention, windows, convolutions; then experts, state spaces, linear attention, latent attention.
KINDS = ("llama", "gemma3_text", "lfm2")
MORE = ("gpt_oss", "deepseek_v3", "nemotron_h", "qwen3_5", "qwen3_moe", "gemma2", "kimi_linear", "granitemoehybrid")
# The first is the beginning of the second; prompts share a beginning, and one is longer than a chunk of reading.
LABELS = [[7, 3], [7, 9, 11, 3], [5, 3], [3], [12, 13, 14, 15, 3]]
PROMPTS = [(*prompt(9), *prompt(length, length)) for length in (6, 1, 40, 6)]


def engine_of(model: Any, tokenizer: Any) -> Engine:
    return Engine(LoadedModel(model, tokenizer, {}, Path(), mx.float32))


def by_itself(model: Any, row: list[int], label: list[int]) -> float:
    """log p(label | row) from the logits of one whole row, in numpy."""
    logits = np.array(model(mx.array([[*row, *label]]))[0].astype(mx.float32)).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return float(sum(logs[len(row) - 1 + place, token] for place, token in enumerate(label)))


@pytest.mark.parametrize("name", [*KINDS, *(pytest.param(name, marks=pytest.mark.real) for name in MORE)])
def test_likelihoods_are_those_of_each_row_by_itself(name: str, tiny: LoadedModel, monkeypatch: Any) -> None:
    """On every kind of model, from one reading of the prompt: whole rows are run for the longest prompt only."""
    model = build(*CONFIGS[name]) if isinstance(CONFIGS[name], tuple) else build(name, CONFIGS[name])
    whole: list[Any] = []
    monkeypatch.setattr(study, "summed", lambda *words, own=study.summed: (whole.append(1), own(*words))[1])
    monkeypatch.setattr(study, "MOST_POSITIONS", 60)  # labels go in parts
    engine = engine_of(model, tiny.tokenizer)
    found = log_likelihoods(engine, PROMPTS, LABELS)
    wanted = [[by_itself(model, list(row), label) for label in LABELS] for row in PROMPTS]
    assert found == pytest.approx(np.array(wanted), rel=2e-3, abs=2e-3)
    assert len(whole) == 1


def test_caches_that_cannot_be_shared_are_noticed_and_rows_run_whole(tiny: LoadedModel, monkeypatch: Any) -> None:
    def broken(cache: Any, count: int) -> Any:
        copied = copies(cache, count)
        copied.state = [mx.zeros_like(value) if isinstance(value, mx.array) else value for value in cache.state]
        return copied

    copies = study._copies
    expected = log_likelihoods(Engine(tiny), PROMPTS, LABELS)
    for fault in (broken, lambda cache, count: cache):
        monkeypatch.setattr(study, "_copies", fault)
        assert log_likelihoods(Engine(tiny), PROMPTS, LABELS) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{"method": "prompt", "virtual_tokens": 3}, {"method": "prompt", "virtual_tokens": 2, "position": "infix"},
     {"method": "prefix", "virtual_tokens": 2}, {"method": "dora", "rank": 2}],
    ids=lambda settings: f"{settings['method']} {settings.get('position', '')}",
)  # fmt: skip
def test_the_adapter_in_use_counts(tiny: LoadedModel, settings: dict[str, Any]) -> None:
    engine = Engine(tiny)
    base = log_likelihoods(engine, PROMPTS, LABELS)
    engine.add("own", random_adapter(tiny.model, 1, **settings))
    engine.use("own")
    places = [4, None, 12, None] if settings.get("position") else None
    found = log_likelihoods(engine, PROMPTS, LABELS, first_answers=places)
    virtual = engine.virtual
    for row, prompted in enumerate(PROMPTS):
        whole = virtual.prompt(prompted, (places or [None] * 4)[row]) if virtual else list(prompted)
        wanted = [by_itself(tiny.model, whole, label) for label in LABELS]
        assert found[row] == pytest.approx(wanted, rel=1e-3)
    assert np.abs(found - base).max() > 0.1
    put(tiny.model, {})


def asked_of(write_rows: Callable[..., Path], tiny: LoadedModel, answers: list[str], **more: Any) -> Questions:
    rows = [{"prompt": f"question {number}", "completion": one} for number, one in enumerate(answers)]
    return questions(str(write_rows(rows)), Data(**more), tiny.tokenizer, exact=True)


@pytest.mark.parametrize("template", ["auto", "none"])
def test_labels_are_the_tokens_that_rows_have_after_the_prompt(
    tiny: LoadedModel, write_rows: Callable[..., Path], template: str
) -> None:
    answers = ["not", "not sure", "yes", "not"]
    asked = asked_of(write_rows, tiny, answers, template=template)
    labels = ("yes", "not", "not sure")
    tokens = label_tokens(asked, labels, tiny.tokenizer)
    assert tokens is not None and [tiny.tokenizer.decode(one) for one in tokens] == [
        f"{label}<|end|>" for label in labels
    ]
    for row, prompted, answer in zip(asked.rows, asked.prompts, answers, strict=True):
        assert row.tokens.tolist() == [*prompted, *tokens[labels.index(answer)]]
    assert label_tokens(asked, (*labels, "never"), tiny.tokenizer) is None


def test_rows_with_more_than_a_label_have_no_label_tokens(tiny: LoadedModel, write_rows: Callable[..., Path]) -> None:
    asked = asked_of(write_rows, tiny, ["yes", "no"])
    row = asked.rows[0]
    cut = Questions([Row(row.tokens[:-2], row.weights[:-2])], asked.prompts[:1], ["yes"], [0])
    assert label_tokens(cut, ("yes",), tiny.tokenizer) is None
    thought = tiny.tokenizer.encode("<think>so</think>yes")
    tokens = [*asked.prompts[0], *thought, int(row.tokens[-1])]
    weights = np.array([0] * len(asked.prompts[0]) + [1] * (len(thought) + 1))
    with_reasoning = Questions([Row(np.array(tokens), weights)], asked.prompts[:1], ["yes"], [0])
    assert label_tokens(with_reasoning, ("yes",), tiny.tokenizer) is None


def test_accuracy_takes_the_likeliest_label_and_other_scores_what_was_generated(
    tiny: LoadedModel, write_rows: Callable[..., Path]
) -> None:
    answers = ["not", "not sure", "yes", "not", "yes", "yes"]
    asked = asked_of(write_rows, tiny, answers)
    engine = Engine(tiny)
    engine.add("own", random_adapter(tiny.model, 3, rank=4))
    score = choose(asked.answers).score
    assert isinstance(score, Accuracy) and score.labels == ("not", "not sure", "yes")
    each = {None: asked, "own": asked}
    counted: list[int] = []
    results = evaluate_each(engine, each, score=score, on_row=lambda: counted.append(1))
    assert len(counted) == 2 * (6 + 6)  # rows and prompts: nothing was generated
    tokens = label_tokens(asked, score.labels, tiny.tokenizer)
    assert tokens is not None
    for result, name in zip(results, each, strict=True):
        engine.use(name)
        wanted = [
            score.labels[int(np.argmax([by_itself(tiny.model, prompted, label) for label in tokens]))]
            for prompted in asked.prompts
        ]
        assert [row.answer for row in result.each] == wanted and result.exact_match is None
        right = [one == answer for one, answer in zip(wanted, answers, strict=True)]
        assert [row.score for row in result.each] == right and result.score == pytest.approx(np.mean(right))
        assert result.details["answers"] == "likeliest" and result.score_name == "accuracy"
    both = evaluate_each(engine, {None: asked}, score=Exact(), more=[score], max_tokens=3)[0]
    assert both.score_name == "exact" and both.exact_match == both.score
    assert both.details["more"]["accuracy"]["score"] == results[0].score
    generated = evaluate_each(engine, {None: asked}, score=Accuracy(("other",)), max_tokens=3)[0]
    assert generated.details["answers"] == "generated" and generated.score == 0
