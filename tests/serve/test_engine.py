"""One base, adapters swapped inside it: exact restoration, dropped caches, generation that is what the model says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_lora.adapters.attach import Wrappers, build
from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError, MlxLoraError
from mlx_lora.models.load import LoadedModel
from mlx_lora.serve.engine import Engine, Sampling
from mlx_lora.serve.prefill import next_size

PROMPT = list(range(20, 40))


def adapter(loaded: LoadedModel, seed: int) -> Wrappers:
    """Random factors, large enough to change every answer."""
    wrappers = build(loaded.model, Adapter(rank=4), seed=seed)
    for index, wrapper in enumerate(wrappers.values()):
        wrapper.lora_b = mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(100 * seed + index))
    return wrappers


@pytest.fixture
def engine(tiny: LoadedModel) -> Engine:
    engine = Engine(tiny)
    for seed, name in enumerate("ab", start=1):
        engine.add(name, adapter(tiny, seed))
    return engine


def logits(engine: Engine) -> mx.array:
    return engine.loaded.model(mx.array([PROMPT]))


def greedy(engine: Engine, prompt: list[int], count: int) -> list[int]:
    """Without any cache: the whole sequence again for every token."""
    tokens = list(prompt)
    for _ in range(count):
        token = int(engine.loaded.model(mx.array([tokens]))[0, -1].argmax().item())
        if token in engine.ends:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def test_a_b_a_base_restores_bit_identical_logits(engine: Engine) -> None:
    seen: dict[str | None, mx.array] = {}
    for name in (None, "a", "b", "a", None, "b", None):
        engine.use(name)
        now = logits(engine)
        assert mx.array_equal(seen.setdefault(name, now), now), name
    assert not mx.array_equal(seen["a"], seen["b"]) and not mx.array_equal(seen["a"], seen[None])


def test_generation_equals_the_model_run_without_a_cache(engine: Engine) -> None:
    for name in (None, "a"):
        engine.use(name)
        assert list(engine.stream(PROMPT, max_tokens=8)) == greedy(engine, PROMPT, 8)


def test_a_swap_drops_the_cache_of_the_other_adapter(engine: Engine) -> None:
    """An adapter that continued from another's keys and values would answer something else."""
    engine.use("a")
    first = list(engine.stream(PROMPT, max_tokens=6))
    engine.use("b")
    longer = [*PROMPT, *first, 50, 51]
    assert list(engine.stream(longer, max_tokens=6)) == greedy(engine, longer, 6)


def test_a_continued_prompt_reuses_its_cache_with_the_same_answer(engine: Engine) -> None:
    engine.use("a")
    first = list(engine.stream(PROMPT, max_tokens=6))
    longer = [*PROMPT, *first, 50, 51]
    layers = engine.cache.layers
    second = list(engine.stream(longer, max_tokens=6))
    assert engine.cache.layers is layers
    assert second == greedy(engine, longer, 6)
    assert list(engine.stream(PROMPT[:10] + [60], max_tokens=6)) == greedy(engine, PROMPT[:10] + [60], 6)


def test_a_pass_that_breaks_off_takes_its_cache_along(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some layers would hold one token more than others, and the next answer would be nonsense."""
    list(engine.stream(PROMPT, max_tokens=3))
    layer = engine.loaded.model.layers[-1]
    monkeypatch.setattr(type(layer), "__call__", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(engine.stream([*PROMPT, 50], max_tokens=3))
    monkeypatch.undo()
    assert engine.cache.layers is None
    assert list(engine.stream([*PROMPT, 51], max_tokens=5)) == greedy(engine, [*PROMPT, 51], 5)


def _interrupted(*arguments: Any, **named: Any) -> None:
    raise KeyboardInterrupt


def test_a_long_prompt_is_read_in_chunks_that_signals_and_progress_can_reach(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one pass over thousands of tokens, SIGTERM and Ctrl-C wait for all of it."""
    sizes, told = lengths_of_passes(engine, monkeypatch), []
    engine.chunk = 16
    prompt = [20 + index % 200 for index in range(70)]
    answer = list(engine.stream(prompt, max_tokens=5, on_prompt=lambda *how_far: told.append(how_far)))
    assert sizes[:6] == [16, 16, 16, 16, 5, 1]
    assert told == [(0, 70), (16, 70), (32, 70), (48, 70), (64, 70), (70, 70)]
    monkeypatch.undo()
    assert answer == greedy(engine, prompt, 5)


def test_chunks_that_take_long_become_smaller_and_grow_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One slow moment of a busy machine must not slow down the rest of a prompt."""
    assert [next_size(64, seconds, 128) for seconds in (2.0, 0.5, 0.1)] == [32, 64, 128]
    assert [next_size(size, 2.0, 128) for size in (32, 16)] == [16, 16]
    assert next_size(128, 0.1, 128) == 128 and next_size(8, 2.0, 8) == 8
    sizes = lengths_of_passes(engine, monkeypatch)
    monkeypatch.setattr("mlx_lora.serve.prefill.TOO_LONG", 0)
    engine.chunk = 32
    list(engine.stream(PROMPT * 4, max_tokens=1))
    assert sizes[:4] == [32, 16, 16, 15]


def test_an_interrupt_between_chunks_ends_the_prompt(engine: Engine) -> None:
    engine.chunk = 8
    told = []

    def interrupt(done: int, total: int) -> None:
        told.append(done)
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(engine.stream(PROMPT, max_tokens=3, on_prompt=interrupt))
    assert told == [0, 8] and engine.cache.layers is None
    assert list(engine.stream(PROMPT, max_tokens=5)) == greedy(engine, PROMPT, 5)


def lengths_of_passes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the number of tokens of each pass."""
    sizes: list[int] = []
    original = type(engine.loaded.model).__call__

    def counting(model: Any, tokens: mx.array, *arguments: Any, **named: Any) -> Any:
        sizes.append(tokens.shape[1])
        return original(model, tokens, *arguments, **named)

    monkeypatch.setattr(type(engine.loaded.model), "__call__", counting)
    return sizes


@pytest.mark.processor("a limit on a GPU is for wired memory")
def test_generating_does_not_wait_for_every_operation(engine: Engine) -> None:
    """MLX does below a memory limit of 0: most of the time of a token went into waiting."""
    limit = limit_now()
    assert [limit_now() for _ in engine.stream(PROMPT, max_tokens=3)] == [limit] * 3


def limit_now() -> int:
    """MLX tells the limit only while setting another."""
    limit = mx.set_memory_limit(1 << 40)
    mx.set_memory_limit(limit)
    return int(limit)


def test_a_batch_answers_as_one_by_one(engine: Engine) -> None:
    engine.use("b")
    prompts = [PROMPT[:length] for length in (3, 17, 9, 20, 5)]
    answers = dict(engine.batch(prompts, max_tokens=7))
    assert answers == {index: greedy(engine, prompt, 7) for index, prompt in enumerate(prompts)}


def test_sampling_is_decided_by_its_seed(engine: Engine) -> None:
    runs = []
    for seed in (1, 1, 2):
        engine.forget()
        runs.append(list(engine.stream(PROMPT, max_tokens=12, sampling=Sampling(temperature=1.5, seed=seed))))
    assert runs[0] == runs[1] != runs[2]


def test_swapping_is_fast_and_keeps_the_base_arrays(engine: Engine) -> None:
    from mlx.utils import tree_flatten

    before = {name: id(array) for name, array in tree_flatten(engine.loaded.model.parameters())}
    times = [engine.use(name) for name in ("a", "b", "a", None)]
    assert {name: id(array) for name, array in tree_flatten(engine.loaded.model.parameters())} == before
    assert sorted(times)[1] < 20


def test_errors(engine: Engine) -> None:
    with pytest.raises(AdapterError, match="'c'"):
        engine.use("c")
    with pytest.raises(MlxLoraError, match="empty"):
        list(engine.stream([]))


def test_text_streams_whole_characters(tiny: LoadedModel, tmp_path: Path, monkeypatch: Any) -> None:
    from mlx_lora.serve.answer import Answer, stream_text

    engine = Engine(tiny)
    tokens = tiny.tokenizer.encode("añ€🙂", add_special_tokens=False)
    monkeypatch.setattr(engine, "stream", lambda *args, **named: iter(tokens))
    answer = Answer()
    pieces = list(stream_text(engine, [1], answer, max_tokens=99))
    assert "".join(pieces) == answer.text == "añ€🙂" and "\ufffd" not in "".join(pieces)
    assert answer.finish_reason == "stop" and answer.generated_tokens == len(tokens)
