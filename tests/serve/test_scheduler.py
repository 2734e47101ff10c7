"""Many requests at once: every row gets what it gets by itself, and nothing that happens to one changes another."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_lora.errors import AdapterError, Busy, MlxLoraError, ModelError, NotFinite, Stopped
from mlx_lora.models.load import LoadedModel, load
from mlx_lora.serve.requests import Answer, Failed, Finished, Reading, Request, Sampling, Token
from mlx_lora.serve.sampling import sampler
from mlx_lora.serve.scheduler import Limits, Scheduler
from tests.serve.requests import assert_same_or_tied, by_itself, giving, prompt, random_adapter

ADAPTERS = {
    "a": lambda model: random_adapter(model, 1, rank=4),
    "b": lambda model: random_adapter(model, 2, rank=16, targets="all-linear"),
    "c": lambda model: random_adapter(model, 3, method="vera", rank=8),
    "d": lambda model: random_adapter(model, 4, method="adalora", rank=4, targets=["v_proj", "embed_tokens"]),
    "dora": lambda model: random_adapter(model, 5, method="dora", rank=4),
    "prefix": lambda model: random_adapter(model, 6, method="prefix", virtual_tokens=3),
}
PREPARE = giving(ADAPTERS)
Make = Callable[..., Scheduler]


@pytest.fixture
def scheduler(tiny_path: Path) -> Iterator[Make]:
    """`scheduler(rows=…)` starts one on the tiny model, with the adapters above; all end with the test."""
    started: list[Scheduler] = []

    def start(*, prepare: Any = PREPARE, **limits: Any) -> Scheduler:
        started.append(Scheduler(lambda: load(tiny_path), limits=Limits(**limits), prepare=prepare))
        return started[-1].start()

    yield start
    for one in started:
        one.close(timeout=20)
        assert not one.alive


def assert_as_by_itself(loaded: LoadedModel, requests: list[Request], answers: list[Answer]) -> None:
    ends = loaded.tokenizer.eos_token_ids
    wrappers = {None: {}} | {name: make(loaded.model) for name, make in ADAPTERS.items()}
    for request, answer in zip(requests, answers, strict=True):
        own = by_itself(loaded.model, wrappers[request.adapter], request, ends)
        assert_same_or_tied(loaded.model, wrappers[request.adapter], request, answer.tokens(), own)


def test_sixteen_prompts_over_four_adapters_and_the_base_in_one_pass_a_step(scheduler: Make, tiny: LoadedModel) -> None:
    running = scheduler()
    names = [None, "a", "b", "c", "d"]
    requests = [
        Request(prompt(3 + 5 * index, index), names[index % 5], max_tokens=12 + index % 3) for index in range(16)
    ]
    answers = [running.submit(request) for request in requests]
    assert_as_by_itself(tiny, requests, answers)
    # sixteen rows one after another would take 16 · 13 passes for their tokens alone
    assert running.status().passes <= 14 + 16 + 8


def test_the_same_seed_gives_the_same_text_whatever_else_is_in_the_batch(scheduler: Make) -> None:
    running = scheduler()
    sampling = Sampling(temperature=1.2, top_p=0.9, top_k=50, min_p=0.01, seed=7)
    asked = Request(prompt(9), "a", max_tokens=20, sampling=sampling)
    first = running.submit(asked).tokens()
    others = [
        Request(prompt(4 + index), name, max_tokens=30, sampling=Sampling(temperature=1.0, seed=index))
        for index, name in enumerate(["b", None, "c", "a"])
    ]
    crowd = [running.submit(request) for request in others]
    assert running.submit(asked).tokens() == first and len(first) > 5
    assert [answer.tokens() for answer in crowd] == [running.submit(request).tokens() for request in others]
    assert running.submit(replace(asked, sampling=replace(sampling, seed=8))).tokens() != first


@pytest.mark.parametrize("temperature", [1e-60, 1e300])
def test_no_temperature_draws_a_token_that_is_excluded(temperature: float) -> None:
    logits = mx.array([[0.1, 2.0, 1.5, -3.0]])
    log_probabilities = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    drawn = {int(sampler(Sampling(temperature, top_k=2, seed=seed))(log_probabilities).item()) for seed in range(20)}
    assert drawn == ({1} if temperature < 1 else {1, 2})


@pytest.mark.real
def test_methods_that_don_t_join_have_batches_of_their_own_and_say_so(scheduler: Make, tiny: LoadedModel) -> None:
    running = scheduler()
    names = ["dora", "a", "prefix", None, "dora", "b", "prefix"]
    requests = [Request(prompt(5 + index, index), name, max_tokens=15) for index, name in enumerate(names)]
    answers = [running.submit(request) for request in requests]
    assert_as_by_itself(tiny, requests, answers)
    alone = dict(running.status().alone)
    assert set(alone) == {"dora", "prefix"} and "DoRA" in alone["dora"] and "Prefix" in alone["prefix"]


def test_prompt_tuning_puts_its_virtual_tokens_in(scheduler: Make, tiny: LoadedModel) -> None:
    makers = {"p": lambda model: random_adapter(model, 6, method="prompt", virtual_tokens=4, size=0.5)}
    running = scheduler(prepare=giving(makers))
    request = Request(prompt(6), "p", max_tokens=8)
    answers = [running.submit(request), running.submit(Request(prompt(6), max_tokens=8))]
    full = Request((*range(-1, -5, -1), *request.tokens), "p", max_tokens=8)
    wrappers = makers["p"](tiny.model)
    own = by_itself(tiny.model, wrappers, full, tiny.tokenizer.eos_token_ids)
    found = answers[0].tokens()
    assert_same_or_tied(tiny.model, wrappers, full, found, own)
    assert answers[1].tokens() != found


def test_a_long_prompt_is_read_in_chunks_beside_answers_that_go_on(scheduler: Make) -> None:
    running = scheduler()
    order: list[tuple[str, Any]] = []
    quick = running.submit(Request(prompt(4), max_tokens=60), lambda event: order.append(("quick", event)))
    while not order:
        time.sleep(0.002)
    slow = running.submit(Request(prompt(400), "a", max_tokens=2), lambda event: order.append(("slow", event)))
    wait_for(lambda: sum(isinstance(event, Finished) for _, event in order) == 2)
    readings = [index for index, (name, event) in enumerate(order) if name == "slow" and isinstance(event, Reading)]
    between = {
        index for index, (name, event) in enumerate(order) if name == "quick" and isinstance(event, Token)
    } & set(range(readings[0], readings[-1]))
    assert len(readings) >= 4 and len(between) >= len(readings) - 2
    assert [event.done for name, event in order if name == "slow" and isinstance(event, Reading)][-1] == 400
    assert quick.request.adapter is None and slow.request.adapter == "a"


def wait_for(condition: Callable[[], bool], *, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it didn't happen"
        time.sleep(0.002)


def test_stop_sequences_end_an_answer_and_are_no_part_of_it(scheduler: Make) -> None:
    running = scheduler()
    asked = Request(prompt(8), "b", max_tokens=24)
    whole = running.submit(asked).tokens()
    assert len(whole) > 8
    stop = tuple(whole[4:7])
    place = next(index for index in range(len(whole)) if tuple(whole[index : index + 3]) == stop)
    events = list(running.submit(replace(asked, stop=((*stop[:2], 89, 88), stop, (87, 86)))))
    assert [event.token for event in events if isinstance(event, Token)] == whole[:place]
    assert isinstance(events[-1], Finished) and events[-1].reason == "stop"
    # what begins like a stop sequence and goes on in another way is delivered
    other = running.submit(replace(asked, stop=((whole[2], whole[3], (whole[4] + 1) % 90),))).tokens()
    assert other == whole


def test_an_end_token_ends_an_answer_and_is_no_part_of_it(scheduler: Make) -> None:
    running = scheduler()

    def end_after_three(tokens: mx.array, logits: mx.array) -> mx.array:
        forced = 256 if tokens.size >= 8 + 3 else 65
        return mx.where(mx.arange(logits.shape[-1]) == forced, logits, -mx.inf)

    events = list(running.submit(Request(prompt(8), "a", processors=(end_after_three,))))
    assert [event.token for event in events if isinstance(event, Token)] == [65, 65, 65]
    assert events[-1] == Finished("stop", 8, 0, 3)


def test_log_probabilities_are_told_where_they_are_asked_for(scheduler: Make, tiny: LoadedModel) -> None:
    running = scheduler()
    asked = Request(prompt(8), max_tokens=3, logprobs=4)
    crowd = running.submit(Request(prompt(5), "a", max_tokens=3))
    tokens = [event for event in running.submit(asked) if isinstance(event, Token)]
    logits = tiny.model(mx.array([[*asked.tokens, *(token.token for token in tokens[:-1])]]))[0, 7:]
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for index, token in enumerate(tokens):
        assert token.logprob == pytest.approx(expected[index, token.token].item(), abs=1e-3)
        assert token.top[0] == (token.token, pytest.approx(token.logprob)) and len(token.top) == 4
        assert all(first[1] >= second[1] for first, second in zip(token.top, token.top[1:], strict=False))
    assert all(event.logprob is None for event in crowd if isinstance(event, Token))


def test_a_processor_that_raises_ends_its_own_row_alone(scheduler: Make, tiny: LoadedModel) -> None:
    running = scheduler()

    def fails_later(tokens: mx.array, logits: mx.array) -> mx.array:
        if tokens.size > 9:
            raise ValueError("a grammar's fault")
        return logits

    requests = [Request(prompt(6, index), name, max_tokens=15) for index, name in enumerate(["a", None, "b"])]
    answers = [running.submit(request) for request in requests]
    with pytest.raises(ValueError, match="a grammar's fault"):
        running.submit(Request(prompt(6), "a", max_tokens=15, processors=(fails_later,))).tokens()
    assert_as_by_itself(tiny, requests, answers)


def test_logits_that_aren_t_finite_end_their_row_alone(scheduler: Make, tiny: LoadedModel) -> None:
    def broken(model: Any) -> Any:
        wrappers = random_adapter(model, 9, rank=4)
        for wrapper in wrappers.values():
            wrapper.lora_b = mx.full(wrapper.lora_b.shape, mx.nan)
        return wrappers

    running = scheduler(prepare=giving({**ADAPTERS, "broken": broken}))
    requests = [Request(prompt(6, index), name, max_tokens=15) for index, name in enumerate(["a", None, "b"])]
    answers = [running.submit(request) for request in requests]
    with pytest.raises(NotFinite):
        running.submit(Request(prompt(7), "broken")).tokens()
    assert_as_by_itself(tiny, requests, answers)


def test_a_request_that_can_t_begin_fails_by_itself(scheduler: Make) -> None:
    running = scheduler()
    good = running.submit(Request(prompt(6), "a", max_tokens=5))
    with pytest.raises(AdapterError, match="no adapter 'nobody'"):
        running.submit(Request(prompt(6), "nobody")).tokens()
    with pytest.raises(MlxLoraError, match="is not a name"):
        running.submit(Request(prompt(6), "../tiny")).tokens()
    with pytest.raises(ModelError, match="the model's embedding has"):
        running.submit(Request((5, 100_000), "a")).tokens()
    with pytest.raises(MlxLoraError, match="the prompt has 513 tokens, this model's context is 512"):
        running.submit(Request(prompt(513))).tokens()
    assert len(running.submit(Request(prompt(510), max_tokens=9)).tokens()) == 3, "the context has no room for more"
    assert len(good.tokens()) == 5
    for wrong in ({"tokens": ()}, {"tokens": (1,), "max_tokens": 0}, {"tokens": (1,), "stop": ((),)}):
        with pytest.raises(MlxLoraError):
            Request(**wrong)
    with pytest.raises(MlxLoraError, match="temperature is -1.*top_p is 2"):
        Sampling(temperature=-1, top_p=2)


def test_a_pass_that_fails_is_run_again_row_by_row(
    scheduler: Make, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory, for example: only the row at fault is lost, and the others' texts stay what they are."""
    from mlx_lora.serve.rows import RowsModel

    poison, call = 77, RowsModel.__call__

    def fails(model: RowsModel, tokens: mx.array, cache: list[Any]) -> mx.array:
        if (tokens == poison).any().item():
            raise RuntimeError("no memory for this row")
        return call(model, tokens, cache)

    running = scheduler()
    sampled = Sampling(temperature=1.0, top_k=5, seed=3)
    requests = [
        Request(prompt(6, index, most=60), name, max_tokens=15) for index, name in enumerate(["a", None, "dora"])
    ] + [Request(prompt(6, 9, most=60), "b", max_tokens=15, sampling=sampled)]
    expected = [running.submit(request).tokens() for request in requests]
    assert all(poison not in answer for answer in expected), "the test's own prompts would fail"
    monkeypatch.setattr(RowsModel, "__call__", fails)
    answers = [running.submit(request) for request in requests]
    with pytest.raises(RuntimeError, match="no memory for this row"):
        running.submit(Request((5, poison, 9, 4), "a", max_tokens=15)).tokens()
    assert [answer.tokens() for answer in answers] == expected
    monkeypatch.undo()
    assert running.submit(Request((5, poison, 9, 4), "a", max_tokens=3)).tokens()


def test_rows_of_a_pass_that_failed_are_not_passed_by_others(scheduler: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each needs the lane for itself: one that joined meanwhile would keep them waiting."""
    from mlx_lora.serve.rows import RowsModel

    call, failed = RowsModel.__call__, list[bool]()

    def fails_once(model: RowsModel, tokens: mx.array, cache: list[Any]) -> mx.array:
        if tokens.shape[0] == 2 and not failed:
            failed.append(True)
            raise RuntimeError("no memory for two")
        return call(model, tokens, cache)

    running = scheduler(rows=2)
    monkeypatch.setattr(RowsModel, "__call__", fails_once)
    ends: list[int] = []

    def submit(number: int) -> Answer:
        return running.submit(
            Request(prompt(5, number), max_tokens=60),
            lambda event: ends.append(number) if isinstance(event, Finished) else None,
        )

    answers = [submit(number) for number in range(6)]
    wait_for(lambda: len(ends) == len(answers))
    assert failed and ends[:2] == [0, 1]


def test_a_cancelled_row_leaves_at_once_and_the_others_go_on(scheduler: Make, tiny: LoadedModel) -> None:
    running = scheduler(rows=3)
    staying = [Request(prompt(6, index), name, max_tokens=25) for index, name in enumerate(["a", None])]
    answers = [running.submit(request) for request in staying]
    leaving = running.submit(Request(prompt(9), "b", max_tokens=100_000))
    queued = running.submit(Request(prompt(9), "b", max_tokens=7))
    never = running.submit(Request(prompt(9), "c", max_tokens=7))
    assert isinstance(leaving.next(timeout=20), Reading)
    never.cancel()
    leaving.cancel()
    leaving.cancel()
    ends = [list(answer)[-1] for answer in (leaving, never)]
    assert [(end.reason, end.generated_tokens < 1000) for end in ends if isinstance(end, Finished)] == [
        ("cancelled", True)
    ] * 2
    assert len(queued.tokens()) == 7
    assert_as_by_itself(tiny, staying, answers)
    wait_for(lambda: running.status().running == 0)
    leaving.cancel()  # after its end it does nothing


def test_too_many_requests_are_refused(scheduler: Make) -> None:
    running = scheduler(rows=2, waiting=3)
    answers = [running.submit(Request(prompt(5), max_tokens=100_000)) for _ in range(5)]
    with pytest.raises(Busy, match="5 requests"):
        running.submit(Request(prompt(5)))
    assert running.status().waiting + running.status().running == 5
    for answer in answers:
        answer.cancel()
    wait_for(lambda: running.status().running + running.status().waiting == 0)
    assert len(running.submit(Request(prompt(5), max_tokens=4)).tokens()) == 4


def test_closing_ends_what_runs_with_what_there_is(scheduler: Make) -> None:
    running = scheduler()
    answer = running.submit(Request(prompt(5), max_tokens=100_000))
    while not isinstance(answer.next(timeout=20), Token):
        pass
    running.close(timeout=20)
    last = list(answer)[-1]
    assert isinstance(last, Finished) and last.reason == "cancelled" and last.generated_tokens >= 1
    with pytest.raises(Stopped):
        running.submit(Request(prompt(5)))


def test_closing_may_let_what_runs_finish_and_takes_nothing_new(scheduler: Make) -> None:
    running = scheduler()
    answer = running.submit(Request(prompt(5), "a", max_tokens=40))
    closing = threading.Thread(target=lambda: running.close(finish=20))
    closing.start()
    wait_for(lambda: running._closing)
    with pytest.raises(Stopped, match="no more requests|has ended"):
        running.submit(Request(prompt(5)))
    assert len(answer.tokens()) == 40
    closing.join(20)
    assert not running.alive
    Scheduler(lambda: pytest.fail("it was never started")).close()


def test_a_dead_thread_gives_every_waiter_an_error(scheduler: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_lora.serve.worker import Worker

    running = scheduler(rows=1)
    answers = [running.submit(Request(prompt(5), "a", max_tokens=100_000)) for _ in range(3)]
    answers[0].next(timeout=20)
    delivered: list[Any] = []
    running.submit(Request(prompt(5)), delivered.append)
    monkeypatch.setattr(Worker, "turn", _killed)
    start = time.monotonic()
    for answer in answers:
        with pytest.raises(Stopped, match="killed on purpose"):
            list(answer)
    assert time.monotonic() - start < 5
    assert isinstance(delivered[-1], Failed) and not running.alive and not running.status().alive
    with pytest.raises(Stopped):
        running.submit(Request(prompt(5)))
    with pytest.raises(Stopped):
        running.load("a", timeout=5)


def _killed(*_: Any) -> None:
    raise SystemExit("killed on purpose")


def test_a_thread_that_is_stuck_is_seen(scheduler: Make) -> None:
    running = scheduler()
    wait, release = threading.Event(), threading.Event()

    def stuck(tokens: mx.array, logits: mx.array) -> mx.array:
        wait.set()
        release.wait(20)
        return logits

    answer = running.submit(Request(prompt(5), max_tokens=2, processors=(stuck,)))
    assert wait.wait(20)
    wait_for(lambda: running.status().quiet_seconds > 0.2)
    with pytest.raises(TimeoutError):
        running.load("a", timeout=0.1)
    assert running.alive
    release.set()
    assert len(answer.tokens()) == 2
    wait_for(lambda: running.status().quiet_seconds == 0)


def test_what_loading_raises_is_raised_by_start() -> None:
    def fails() -> LoadedModel:
        raise ModelError("no such base")

    with pytest.raises(ModelError, match="no such base"):
        Scheduler(fails).start()


@pytest.mark.real
def test_a_process_whose_schedulers_have_ended_ends_well(tiny_path: Path) -> None:
    """MLX aborts a process at its end where a thread has left its streams behind, more often than not."""
    code = (
        "import sys; from mlx_lora.models.load import load; from mlx_lora.serve.requests import Request\n"
        "from mlx_lora.serve.scheduler import Scheduler\n"
        "for _ in range(3):\n"
        "    with Scheduler(lambda: load(sys.argv[1])) as running:\n"
        "        assert len(running.submit(Request((1, 2, 3), max_tokens=4)).tokens()) == 4\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
