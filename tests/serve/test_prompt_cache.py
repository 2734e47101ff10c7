"""Prompts that begin alike are read once: for one adapter, within the bytes, with the answers of a prompt read anew."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache, KVCache

from mlx_lora.models.load import LoadedModel, load
from mlx_lora.serve.prompt_cache import PromptCache
from mlx_lora.serve.requests import Finished, Request, Token
from mlx_lora.serve.scheduler import Limits, Scheduler
from tests.models.tiny import mixed, plain
from tests.models.tiny.build import build
from tests.serve.requests import by_itself, giving, prompt, random_adapter

CONFIGS = {**plain.CONFIGS, **mixed.CONFIGS}


def keys_of(count: int) -> list[Any]:
    """Caches of two layers that hold `count` tokens; the values say which."""
    layers = [KVCache(), KVCache()]
    for layer in layers:
        values = mx.broadcast_to(mx.arange(count, dtype=mx.float32)[None, None, :, None], (1, 1, count, 4))
        layer.update_and_fetch(values, values)
    return layers


def state_of(count: int) -> list[Any]:
    layer = ArraysCache(1)
    layer[0] = mx.full((1, 4), count, mx.float32)
    return [layer]


def test_the_longest_beginning_is_found_and_trimmed() -> None:
    cache = PromptCache(1 << 20)
    cache.put("a", [1, 2, 3, 4], keys_of(4))
    cache.put("a", [1, 2, 9, 9, 9, 9], keys_of(6))
    layers, length = cache.find("a", [1, 2, 3, 4, 5])
    assert length == 4 and [layer.offset for layer in layers or []] == [4, 4]
    layers, length = cache.find("a", [1, 2, 9, 9, 7])
    assert length == 4 and [layer.offset for layer in layers or []] == [4, 4]
    assert cache.find("a", [1, 2, 3, 4])[1] == 3, "one token is always left to read"
    assert cache.find("a", [7, 1, 2]) == (None, 0) and cache.find("a", [1]) == (None, 0)
    assert (cache.hits, cache.misses) == (3, 2)


def test_an_adapter_never_gets_what_another_one_or_the_base_computed() -> None:
    cache = PromptCache(1 << 20)
    cache.put("a", [1, 2, 3], keys_of(3))
    assert cache.find("b", [1, 2, 3, 4]) == (None, 0) and cache.find(None, [1, 2, 3, 4]) == (None, 0)
    cache.put(None, [1, 2, 3], keys_of(3))
    cache.drop("a")
    assert cache.find("a", [1, 2, 3, 4]) == (None, 0) and cache.find(None, [1, 2, 3, 4])[1] == 3


def test_what_is_found_may_be_changed_without_changing_what_is_kept() -> None:
    cache = PromptCache(1 << 20)
    cache.put(None, [1, 2, 3], keys_of(3))
    layers, _ = cache.find(None, [1, 2, 9])
    assert layers is not None
    layers[0].update_and_fetch(mx.full((1, 1, 2, 4), 77.0), mx.full((1, 1, 2, 4), 77.0))
    again, length = cache.find(None, [1, 2, 3, 4])
    assert again is not None and length == 3
    assert again[0].keys_and_values()[0][0, 0, :, 0].tolist() == [0, 1, 2]


def test_a_state_serves_only_prompts_that_have_all_of_its_tokens() -> None:
    cache = PromptCache(1 << 20)
    cache.put(None, [1, 2, 3], state_of(3))
    cache.put(None, [1, 2, 3, 4, 5], state_of(5))
    assert cache.find(None, [1, 2, 3]) == (None, 0) and cache.find(None, [1, 2, 7, 8]) == (None, 0)
    layers, length = cache.find(None, [1, 2, 3, 4, 9])
    assert length == 3 and layers is not None and layers[0][0][0, 0].item() == 3
    assert cache.find(None, [1, 2, 3, 4, 5, 6])[1] == 5


def test_bytes_are_bounded_and_the_entry_used_longest_ago_goes() -> None:
    size = sum(layer.nbytes for layer in keys_of(300))
    cache = PromptCache(3 * size)
    for first in (10, 20, 30):
        cache.put(None, [first, *range(299)], keys_of(300))
    cache.find(None, [10, 0, 1])
    cache.put(None, [40, *range(299)], keys_of(300))
    assert cache.nbytes == 3 * size and len(cache) == 3
    assert [cache.find(None, [first, 0, 1])[1] for first in (10, 20, 30, 40)] == [2, 0, 2, 2]
    cache.put(None, [50, *range(1999)], keys_of(2000))  # larger than all there is
    assert len(cache) == 3
    cache.put(None, [10, *range(300)], keys_of(301))  # goes on from one, which it replaces
    assert len(cache) <= 3 and cache.find(None, [10, *range(299), 5])[1] == 300
    cache.shrink(0)
    assert len(cache) == 0 and cache.nbytes == 0


def opened(family: str) -> LoadedModel:
    tokenizer = SimpleNamespace(eos_token_ids={95})
    return LoadedModel(build(family, CONFIGS[family]), tokenizer, {"model_type": family}, Path(), mx.float32)


def answer(running: Scheduler, request: Request) -> tuple[list[int], Finished]:
    *events, end = list(running.submit(request))
    assert isinstance(end, Finished)
    return [event.token for event in events if isinstance(event, Token)], end


def test_turns_and_requests_with_a_common_beginning_reuse_it_with_the_same_answers(tiny_path: Path) -> None:
    makers = {"a": lambda model: random_adapter(model, 1, rank=4)}
    with Scheduler(lambda: load(tiny_path), prepare=giving(makers)) as running:
        tiny = load(tiny_path)
        wrappers: dict[str | None, Any] = {None: {}, "a": makers["a"](tiny.model)}
        for name, start in ((None, prompt(40)), ("a", prompt(40))):
            tokens, end = answer(running, Request(start, name, max_tokens=6))
            assert end.cached_tokens == 0
            next_turn = Request((*start, *tokens, 7, 8, 9), name, max_tokens=6)
            other = Request((*start[:30], 4, 4), name, max_tokens=6)
            for request, cached in ((next_turn, 40 + len(tokens)), (other, 30)):
                found, end = answer(running, request)
                assert end.cached_tokens in (cached, cached - 1) and end.prompt_tokens == len(request.tokens)
                own = by_itself(tiny.model, wrappers[name], request, tiny.tokenizer.eos_token_ids)
                assert found == own
        assert running.status().cached_tokens >= 130


def test_a_cancelled_prompt_leaves_what_was_read(tiny_path: Path) -> None:
    with Scheduler(lambda: load(tiny_path)) as running:
        waiting = running.submit(Request(prompt(300), max_tokens=10_000))
        while not isinstance(waiting.next(timeout=20), Token):
            pass
        waiting.cancel()
        list(waiting)
        assert answer(running, Request((*prompt(300), 5), max_tokens=3))[1].cached_tokens == 300


@pytest.mark.parametrize("family", ["lfm2", "nemotron_h", "gemma3_text", "llama4"])
def test_states_and_windows_are_kept_where_prompts_end_and_where_they_part(family: str) -> None:
    """They can't be trimmed. llama4's caches can't be merged either, so its rows run alone."""
    model = opened(family).model
    with Scheduler(lambda: opened(family)) as running:
        start = prompt(40)
        tokens, _ = answer(running, Request(start, max_tokens=6))
        asked = {
            "the next turn": ((*start, *tokens, 7, 8, 9), 40 + len(tokens) - 1),
            "the next turn, with the answer rendered in another way": ((*start, 50, 51, 52), 39),
            "parts from the first": ((*start[:30], 4, 4, 9), 0),
            "parts there too": ((*start[:30], 5, 6, 1, 2), 30),
            "and again": ((*start[:30], 8, 2), 30),
        }
        for name, (sent, cached) in asked.items():
            found, end = answer(running, Request(sent, max_tokens=6))
            assert end.cached_tokens >= cached, (name, end)
            assert found == by_itself(model, {}, Request(sent, max_tokens=6), [95]), name


def test_the_bound_holds_while_requests_run(tiny_path: Path) -> None:
    with Scheduler(lambda: load(tiny_path), limits=Limits(prompt_cache_bytes=100_000)) as running:
        for index in range(12):
            answer(running, Request(prompt(20 + index, index), max_tokens=3))
            assert running.status().prompt_cache_bytes <= 100_000
        assert running.status().prompt_cache_bytes > 30_000
