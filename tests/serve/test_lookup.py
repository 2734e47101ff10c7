"""Drafts out of the prompt: what is answered stays what it is without them, and they are made where they pay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mlx_lora.models.load import LoadedModel, load
from mlx_lora.serve import lookup, worker
from mlx_lora.serve.lookup import MOST, Lookup, Passes, find_passes
from mlx_lora.serve.requests import Finished, Request, Sampling, Token
from mlx_lora.serve.scheduler import Limits, Scheduler
from mlx_lora.serve.status import Options
from tests.models.tiny import mixed, plain
from tests.models.tiny.build import build
from tests.serve.requests import assert_same_or_tied, by_itself, giving, prompt, random_adapter

CONFIGS = {**plain.CONFIGS, **mixed.CONFIGS}
# How likely drafts hold before any was tried: enough to try them at once.
SURE = 0.6
FREE, DEAR = {1: 1.0, 4: 1.0, 16: 1.0}, {1: 1.0, 4: 4.0, 16: 16.0}
ADAPTERS = {
    "a": lambda model: random_adapter(model, 1, size=0.1, rank=4),
    "dora": lambda model: random_adapter(model, 5, size=0.1, method="dora", rank=4),
    "prefix": lambda model: random_adapter(model, 6, method="prefix", virtual_tokens=3),
    "soft": lambda model: random_adapter(model, 7, method="prompt", virtual_tokens=3),
}


class Told(Passes):
    """Passes that take what a test says, however long they take here."""

    def saw(self, tokens: int, seconds: float) -> None:
        pass


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """What passes take, by their tokens: nothing more for a draft, unless a test changes it."""
    seconds = dict(FREE)
    monkeypatch.setattr(lookup, "START", SURE)
    monkeypatch.setattr(worker, "find_passes", lambda model, name, make_cache=None: Told(seconds))
    return seconds


@pytest.fixture
def scheduler(tiny_path: Path, costs: dict[int, float]) -> Iterator[Scheduler]:
    with Scheduler(lambda: load(tiny_path), limits=Limits(rows=4), prepare=giving(ADAPTERS)) as started:
        yield started


def repeating(length: int, seed: int = 0) -> tuple[int, ...]:
    """A prompt that says the same twice, with one difference."""
    once = prompt(length, seed)
    return (*once, *once[: length // 2], 3, *once[length // 2 :], *once[:4])


def own(loaded: LoadedModel, request: Request) -> list[int]:
    wrappers = ADAPTERS[request.adapter](loaded.model) if request.adapter else {}
    return by_itself(loaded.model, wrappers, request, loaded.tokenizer.eos_token_ids)


def test_a_draft_is_what_followed_the_same_tokens_before() -> None:
    found = Lookup([1, 2, 3, 4, 5, 6, 7, 9, 1, 2, 3], SURE)
    assert found.draft(Passes(FREE), 4) == [4, 5, 6, 7]
    assert found.draft(Passes(FREE), 2) == [4, 5] and found.draft(Passes(FREE), 0) == []
    assert found.draft(Passes(DEAR), 4) == []
    found.push(4)
    assert found.rate > SURE and found.draft(Passes(FREE), 3) == [5, 6, 7]
    found.push(8)  # not what followed, and nothing has stood behind 4 8
    assert found.rate < SURE and found.draft(Passes(FREE), 3) == []
    assert Lookup([1, 2, 3], SURE).draft(Passes(FREE), 3) == []


def test_what_repeats_goes_on_and_virtual_tokens_are_never_drafted() -> None:
    assert Lookup([5, 6, 5, 6], SURE).draft(Passes(FREE), 5) == [5, 6, 5, 6, 5]
    assert Lookup([5, 6, -1, -2, 7, 5, 6], SURE).draft(Passes(FREE), 5) == []
    assert Lookup([5, 6, 8, -2, 7, 5, 6], SURE).draft(Passes(FREE), 5) == [8]


def test_the_longest_sequence_that_stood_before_is_followed() -> None:
    assert Lookup([1, 2, 3, 40, 9, 2, 3, 50, 9, 1, 2, 3], SURE).draft(Passes(FREE), 1) == [40]


def test_a_draft_is_as_long_as_it_pays() -> None:
    steep = Passes({1: 1.0, 4: 1.9, 16: 5.5})
    assert Passes(FREE).best(0.9, MOST)[0] == MOST and Passes(DEAR).best(0.9, MOST) == (0, 1.0)
    counts = [steep.best(rate, MOST)[0] for rate in (0.1, 0.5, 0.8, 0.95)]
    assert counts == sorted(counts) and counts[0] == 0 < counts[2] < counts[3]
    assert steep.seconds(1) == 1.0 and steep.seconds(10) == pytest.approx(3.7)
    for _ in range(60):
        steep.saw(8, 20.0)
    assert steep.seconds(8) > 15 and steep.best(0.8, MOST)[0] < 8


def test_drafts_that_keep_less_than_they_promise_are_believed_less() -> None:
    """Wrong tokens come together: of a draft of 15 that promises 2.5 tokens, 1 comes out."""
    passes = Passes(FREE)
    before = passes.best(0.6, MOST)[1]
    for _ in range(10):
        passes.kept_of(0.6, MOST, 1)
    passes.saw(1, 1.0)
    assert passes.kept < 0.7 and Passes(FREE).best(0.6, MOST)[1] == before
    fresh = Lookup([1, 2, 3, 4, 9, 1, 2, 3], SURE)
    assert fresh.draft(Passes(FREE), 3) and not fresh.draft(passes, 3)
    assert Lookup([1, 2, 3, 4, 9, 1, 2, 3], 0.95).draft(passes, 3), "a row that copies is still believed"


def test_drafts_do_not_pay_where_a_pass_takes_less_than_what_is_beside_it() -> None:
    found = Lookup([1, 2, 3, 4, 5, 6, 7, 9, 1, 2, 3], SURE)
    assert found.draft(Passes(FREE), 4) and not found.draft(Passes({1: 1e-3, 4: 1e-3, 16: 1e-3}), 4)


@pytest.mark.parametrize("adapter", [None, "a", "dora", "prefix", "soft"])
def test_greedy_answers_are_what_they_are_without_drafts(
    scheduler: Scheduler, tiny: LoadedModel, adapter: str | None
) -> None:
    request = Request(repeating(16), adapter, max_tokens=60)
    if adapter == "soft":
        with Scheduler(lambda: load(tiny.path), prepare=giving(ADAPTERS), options=Options(lookup=False)) as without:
            expected = without.submit(request).tokens()
            assert without.status().drafted_tokens == 0
    else:
        expected = own(tiny, request)
    before = scheduler.status()
    found = scheduler.submit(request).tokens()
    wrappers = ADAPTERS[adapter](tiny.model) if adapter else {}
    if adapter != "soft":
        assert_same_or_tied(tiny.model, wrappers, request, found, expected)
    else:
        assert found == expected
    status = scheduler.status()
    assert 0 < status.held_tokens - before.held_tokens <= status.drafted_tokens - before.drafted_tokens
    assert status.passes - before.passes < len(found) - (status.held_tokens - before.held_tokens) + 8


def test_a_row_whose_tokens_are_drafted_makes_room_for_another_at_once(scheduler: Scheduler, tiny: LoadedModel) -> None:
    first, second = Request(repeating(14, 1), max_tokens=220), Request(repeating(9, 2), "a", max_tokens=12)
    running = scheduler.submit(first)
    seen: list[Token] = []
    while len(seen) < 40:
        event = running.next()
        if isinstance(event, Token):
            seen.append(event)
    assert scheduler.status().held_tokens
    joined = scheduler.submit(second).tokens()
    rest = running.tokens()
    assert_same_or_tied(tiny.model, ADAPTERS["a"](tiny.model), second, joined, own(tiny, second))
    found = [token.token for token in seen] + rest
    assert len(found) == 220
    assert_same_or_tied(tiny.model, {}, first, found, own(tiny, first))


def test_the_end_is_where_it_is_without_drafts(scheduler: Scheduler, tiny: LoadedModel) -> None:
    """max_tokens, stop sequences that a draft crosses, and what the prompt cache keeps of it."""
    whole = scheduler.submit(Request(repeating(16), max_tokens=60)).tokens()
    for most in (31, 33, 38):
        answer = list(scheduler.submit(Request(repeating(16), max_tokens=most)))
        end = answer[-1]
        assert isinstance(end, Finished) and end.reason == "length" and end.generated_tokens == most
        assert [event.token for event in answer if isinstance(event, Token)] == whole[:most]
    for place in (20, 30, 41):
        stop = tuple(whole[place : place + 3])
        first = next(i for i in range(len(whole)) if tuple(whole[i : i + 3]) == stop)
        answer = list(scheduler.submit(Request(repeating(16), max_tokens=60, stop=(stop,))))
        assert [event.token for event in answer if isinstance(event, Token)] == whole[:first]
        assert isinstance(answer[-1], Finished) and answer[-1].reason == "stop"
    longer = Request((*repeating(16), *whole[:50], 7), max_tokens=20)
    assert_same_or_tied(tiny.model, {}, longer, scheduler.submit(longer).tokens(), own(tiny, longer))


def test_processors_see_what_they_see_without_drafts(scheduler: Scheduler) -> None:
    seen: list[tuple[int, ...]] = []

    def never_twice(tokens: mx.array, logits: mx.array) -> mx.array:
        """Penalize what the last eight tokens have, and note what it was called with."""
        given: Sequence[int] = tokens.tolist()  # type: ignore[assignment]
        seen.append(tuple(given))
        logits[:, mx.array(list(given)[-8:])] -= 0.5
        return logits

    request = Request(repeating(16), max_tokens=40, processors=(never_twice,), logprobs=2)
    with_drafts = [event for event in scheduler.submit(request) if isinstance(event, Token)]
    assert scheduler.status().held_tokens
    calls = set(seen)
    tokens = [*request.tokens, *(event.token for event in with_drafts)]
    assert calls <= {tuple(tokens[:length]) for length in range(len(request.tokens), len(tokens) + 1)}
    alike = Request(request.tokens, max_tokens=40, processors=request.processors, logprobs=2)
    crowd = [scheduler.submit(one) for one in (alike, Request(prompt(5), max_tokens=60))]
    plainly = [event for event in crowd[0] if isinstance(event, Token)]
    assert [event.token for event in plainly] == [event.token for event in with_drafts]
    for one, other in zip(plainly, with_drafts, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]


def test_sampled_rows_and_drafts_that_dont_pay_are_left_alone(scheduler: Scheduler, costs: dict[int, float]) -> None:
    scheduler.submit(Request(repeating(16), max_tokens=30, sampling=Sampling(temperature=0.5, seed=1))).tokens()
    assert scheduler.status().drafted_tokens == 0


def test_where_a_pass_of_several_tokens_takes_as_long_as_several_nothing_is_drafted(
    tiny_path: Path, costs: dict[int, float]
) -> None:
    costs.update(DEAR)
    with Scheduler(lambda: load(tiny_path)) as running:
        running.submit(Request(repeating(16), max_tokens=30)).tokens()
        assert running.status().drafted_tokens == 0


def opened(family: str, **config: Any) -> LoadedModel:
    tokenizer: Any = SimpleNamespace(eos_token_ids={9_999})
    model = build(family, {**CONFIGS[family], **config})
    return LoadedModel(model, tokenizer, {"model_type": family}, Path(), mx.float32)


@pytest.mark.real
def test_drafts_end_before_a_window_is_full(costs: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """A full window has overwritten what would have to be there again after a draft that was wrong."""
    monkeypatch.setattr(lookup, "GAIN", 1.0)  # drafts, however little they promise
    loaded = opened("gemma3_text", sliding_window=128)
    with Scheduler(lambda: opened("gemma3_text", sliding_window=128), limits=Limits(rows=1)) as running:
        for seed in (0, 1):
            request = Request(repeating(12, seed), max_tokens=200)
            found = running.submit(request).tokens()
            assert_same_or_tied(loaded.model, {}, request, found, by_itself(loaded.model, {}, request, [9_999]))
        assert running.status().drafted_tokens


QUICK = ("gemma2", "lfm2")
REAL = ("gemma3_text", "gpt_oss", "qwen3_moe", "deepseek_v3", "qwen3_next", "mamba2", "llama4", "dbrx")


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(name, marks=pytest.mark.real) for name in REAL)])
def test_families_draft_or_say_why_not(family: str, costs: dict[int, float]) -> None:
    loaded = opened(family)
    tried = find_passes(loaded.model, family)
    if isinstance(tried, str):
        assert family in ("lfm2", "qwen3_next", "mamba2", "gpt_oss", "gemma3_text", "llama4"), tried
        assert tried.startswith(f"{family}: answers are made without lookup, because") and "take tokens back" in tried
        return
    with Scheduler(lambda: opened(family), limits=Limits(rows=3)) as running:
        requests = [Request(repeating(12, seed), max_tokens=90) for seed in range(3)]
        for request in requests:
            found = running.submit(request).tokens()
            assert_same_or_tied(loaded.model, {}, request, found, by_itself(loaded.model, {}, request, []))
        assert running.status().held_tokens
