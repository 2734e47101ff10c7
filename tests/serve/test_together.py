"""Requests that are known beforehand, in the caller's own thread: as each by itself, whatever adapter it names."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlx_lora.errors import NotFinite
from mlx_lora.models.load import LoadedModel
from mlx_lora.serve.engine import Engine
from mlx_lora.serve.requests import Request
from mlx_lora.study.evaluate import Questions, evaluate, evaluate_each
from tests.serve.requests import assert_same_or_tied, by_itself, prompt, random_adapter


@pytest.fixture
def engine(tiny: LoadedModel) -> Engine:
    """The base with an adapter that joins, one with passes of its own, and one with virtual tokens."""
    engine = Engine(tiny)
    for seed, (name, method) in enumerate((("lora", "lora"), ("dora", "dora"), ("soft", "prompt"))):
        settings = {"virtual_tokens": 3} if method == "prompt" else {"rank": 4}
        engine.add(name, random_adapter(tiny.model, seed, method=method, **settings))
    return engine


def test_every_request_has_the_answer_that_it_has_by_itself(engine: Engine) -> None:
    names = [None, "lora", "dora"]
    requests = [Request(prompt(3 + index * 5 % 17, index), names[index % 3], max_tokens=6) for index in range(40)]
    engine.use("lora")
    found = dict(engine.together(requests))
    assert sorted(found) == list(range(40)) and engine.current == "lora"
    model, ends = engine.loaded.model, engine.loaded.tokenizer.eos_token_ids
    for index, request in enumerate(requests):
        wrappers = engine.adapters[request.adapter] if request.adapter else {}
        own = by_itself(model, wrappers, request, ends)
        assert_same_or_tied(model, wrappers, request, found[index], own)


def test_a_prompt_longer_than_the_context_is_answered_and_nan_ends_it_all(engine: Engine) -> None:
    assert len(dict(engine.together([Request(prompt(520), max_tokens=2)]))[0]) == 2
    for _, module in engine.loaded.model.named_modules():
        if hasattr(module, "weight"):
            module.weight = module.weight * float("nan")
    with pytest.raises(NotFinite):
        list(engine.together([Request(prompt(5)), Request(prompt(6))]))


def test_adapters_evaluated_together_have_the_results_that_each_has_alone(engine: Engine) -> None:
    import numpy as np

    from mlx_lora.data.rows import Row

    rows = [Row(np.array(prompt(12, seed)), np.array([0] * 8 + [1] * 4)) for seed in range(9)]
    prompts = [row.tokens[:8].tolist() for row in rows]
    asked = Questions(rows, prompts, [""] * 9, list(range(9)))
    wanted = {}
    for name in (None, "lora", "dora", "soft"):
        engine.use(name)
        says = dict(engine.batch(prompts, max_tokens=5))
        decode = engine.loaded.tokenizer.decode
        answers = [decode(says[index]) if index % 2 else "something else" for index in range(9)]
        wanted[name] = replace(asked, answers=answers)
    results = evaluate_each(engine, wanted, max_tokens=5)
    assert [result.adapter for result in results] == list(wanted)
    assert all(result.exact_match == pytest.approx(4 / 9) for result in results)
    alone = [evaluate(engine, name, own, max_tokens=5) for name, own in wanted.items()]
    assert [(one.loss, one.tokens, one.exact_match) for one in alone] == [
        (one.loss, one.tokens, one.exact_match) for one in results
    ]
