"""Prefixes and prompts in generation: cached, batched, in a conversation, evaluated, and gone without a trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_lora.adapters.attach import build
from mlx_lora.config import Adapter, Data
from mlx_lora.data.batch import collate
from mlx_lora.models.load import LoadedModel
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.serve.answer import prompt_tokens
from mlx_lora.serve.engine import Engine
from mlx_lora.study.evaluate import evaluate, questions
from mlx_lora.train.objectives.likelihood import Loss, as_arrays
from tests.serve.test_engine import greedy

COUNT = 3
IDS = [-1, -2, -3]
PROMPT = list(range(20, 40))
ADAPTERS: dict[str, dict[str, Any]] = {
    "layers": {"method": "prefix"},
    "front": {"method": "prompt"},
    "behind": {"method": "prompt", "position": "infix"},
    "both": {"method": "lora+prompt", "rank": 2},
}


@pytest.fixture
def engine(tiny: LoadedModel) -> Engine:
    engine = Engine(tiny)
    for name, settings in ADAPTERS.items():
        wrappers = build(tiny.model, Adapter(**settings, virtual_tokens=COUNT))
        for index, wrapper in enumerate(wrappers.values()):
            for array in wrapper.adapter_params():
                wrapper[array] = mx.random.normal(wrapper[array].shape, key=mx.random.key(index))
        engine.add(name, wrappers)
    return engine


def complete(name: str | None, prompt: list[int], place: int | None = None) -> list[int]:
    """A prompt with an adapter's virtual tokens, as the engine should run it."""
    if name in ("front", "both"):
        return IDS + prompt
    place = len(prompt) if place is None else place
    return prompt[:place] + IDS + prompt[place:] if name == "behind" else prompt


def test_generation_equals_passes_without_a_cache_and_swaps_leave_the_base(engine: Engine) -> None:
    bare = engine.loaded.model(mx.array([PROMPT]))
    for name in (*ADAPTERS, None):
        engine.use(name)
        now = engine.loaded.model(mx.array([complete(name, PROMPT)]))[:, -1]
        assert mx.allclose(now, bare[:, -1], rtol=1e-2, atol=1e-2) == (name is None)
        assert list(engine.stream(PROMPT, max_tokens=8)) == greedy(engine, complete(name, PROMPT), 8), name
    assert mx.array_equal(engine.loaded.model(mx.array([PROMPT])), bare)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_batch_answers_as_one_by_one(engine: Engine, name: str) -> None:
    engine.use(name)
    prompts, places = [PROMPT[:length] for length in (3, 17, 9, 20, 5)], [None, 4, None, 20, 1]
    answers = dict(engine.batch(prompts, max_tokens=7, first_answers=places))
    expected = [complete(name, prompt, place) for prompt, place in zip(prompts, places, strict=True)]
    assert answers == {index: greedy(engine, prompt, 7) for index, prompt in enumerate(expected)}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_second_turn_continues_the_cache_and_answers_as_from_nothing(engine: Engine, name: str) -> None:
    engine.use(name)
    turns = [{"role": role, "content": word} for role, word in zip(("user", "assistant", "user"), "abc", strict=True)]
    first, whole = (prompt_tokens(engine.loaded.tokenizer, turns[:count]) for count in (1, 3))
    list(engine.stream(first, max_tokens=5))
    layers = engine.cache.layers
    answer = list(engine.stream(whole, max_tokens=5, first_answer=len(first)))
    assert engine.cache.layers is layers
    start = complete(name, whole, len(first))
    assert engine.cache.tokens[: len(start)] == start and answer == greedy(engine, start, 5)


def test_evaluation_has_them_where_training_had_them(engine: Engine, write_rows: Callable[..., Path]) -> None:
    """In rows, and in prompts of several turns, where an infix stays behind the first one."""
    turns = [{"role": role, "content": word} for role, word in zip(("user", "assistant") * 2, "abcd", strict=True)]
    file = str(write_rows([{"messages": turns}, {"messages": turns[:2]}]))
    asked = questions(file, Data(), engine.loaded.tokenizer, exact=True)
    first = len(prompt_tokens(engine.loaded.tokenizer, turns[:1]))
    model = engine.loaded.model
    for name in ADAPTERS:
        engine.use(name)
        prompts = [complete(name, prompt, first) for prompt in asked.prompts]
        says = [engine.loaded.tokenizer.decode(greedy(engine, prompt, 4)) for prompt in prompts]
        wanted = replace(asked, answers=[says[0], says[1] + "?"])
        result = evaluate(engine, name, wanted, max_tokens=4)
        rows = [engine.virtual.row(row) if engine.virtual else row for row in asked.rows]
        total = sum(float(mx.array(Loss(take_apart(model))(as_arrays(collate([row])))).item()) for row in rows)
        assert result.exact_match == 0.5, name
        assert result.loss == pytest.approx(total / result.tokens, rel=1e-5)
        assert result.tokens == sum(row.trained for row in asked.rows)
