"""One answer at a time with drafts and without, in turn; the first token of a long prompt; caches of fewer bits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from mlx_lora.config import Data
from mlx_lora.serve.requests import Request, Token
from mlx_lora.serve.service import Prompt, Service, open_service
from mlx_lora.serve.status import Options

TIE = 0.05
PARAGRAPHS = (
    "Anna Lindqvist works in the harbour office of Gothenburg. Every morning she checks the list of ships that "
    "arrived during the night, and she calls the captains who need a pilot. On Thursday Anna met the new "
    "director, who asked her to write a short report about the delays of the last winter.",
    "The library opens at nine on weekdays and at ten on Saturdays. Readers may borrow up to eight books for four "
    "weeks, and they may renew each of them twice, unless another reader has asked for it. Maps and newspapers "
    "stay in the reading room on the second floor.",
    "The cable car was built in 1934 by an engineer from Graz. It climbs 1,240 metres in eleven minutes, and on a "
    "clear day passengers see three countries from the top. In winter the last car goes down at half past four, "
    "since the wind becomes too strong after sunset.",
)
REWRITE = "Copy the following text, and write the names of months and days in capital letters.\n\n{}"


def tasks(*, base: str, task: str, adapter: str, rows: int) -> dict[str, Any]:
    """The test rows of a task of the embedded base, by the adapter that was trained for it."""
    from mlx_lora import paths
    from mlx_lora.study.evaluate import questions

    with _Both(base, [adapter]) as services:
        file = str(paths.bundled("data", "tasks", task))
        asked = questions(file, Data(), services[0].tokenizer, exact=True).prompts[:rows]
        return _compared(services, [Prompt(tuple(prompt)) for prompt in asked], adapter, most=80)


def rewriting(*, model: str, paragraphs: int) -> dict[str, Any]:
    """Paragraphs that a model is asked to copy with a small change."""
    with _Both(model, []) as services:
        messages = [[{"role": "user", "content": REWRITE.format(text)}] for text in PARAGRAPHS[:paragraphs]]
        return _compared(services, [services[0].prompt(one) for one in messages], None, most=90)


class _Both:
    """A service with lookup and one without, each with its own base."""

    def __init__(self, model: str, adapters: Sequence[str]):
        self._each = [open_service(model, adapters, options=Options(lookup=lookup)) for lookup in (True, False)]

    def __enter__(self) -> list[Service]:
        return [each.__enter__() for each in self._each]

    def __exit__(self, *error: Any) -> None:
        for each in reversed(self._each):
            each.__exit__(*error)


def _compared(
    services: Sequence[Service], prompts: Sequence[Prompt], adapter: str | None, *, most: int
) -> dict[str, Any]:
    """Each prompt with and without, in turn. Seconds are from the first token to the last: prompts aren't drafted."""
    seconds, tokens, tied = [0.0, 0.0], [0, 0], 0
    for service in services:  # what compiles, compiles now
        service.ask(prompts[0], adapter, max_tokens=8).whole()
    for turn, prompt in enumerate(prompts):
        said: dict[int, list[int]] = {}
        for side in ((0, 1), (1, 0))[turn % 2]:
            request = Request(prompt.tokens, adapter, most)
            said[side], taken = _timed(services[side], request)
            seconds[side] += taken
            tokens[side] += max(len(said[side]) - 1, 0)
        tied += said[0] != said[1]
        if said[0] != said[1]:
            _check_tie(services[1], prompt, adapter, said[0], said[1])
    status = services[0].scheduler.status()
    rates = [count / taken if count else None for count, taken in zip(tokens, seconds, strict=True)]
    return {
        "with": rates[0], "without": rates[1],
        "ratio": rates[0] / rates[1] if rates[0] and rates[1] else None,  # None where each answer is one token
        "answers": len(prompts), "parted_at_ties": tied,
        "drafted": status.drafted_tokens, "held": status.held_tokens, "tokens": tokens[0],
        "no_lookup": status.no_lookup,
    }  # fmt: skip


def _timed(service: Service, request: Request) -> tuple[list[int], float]:
    tokens, first, last = [], 0.0, 0.0
    for event in service.scheduler.submit(request):
        if isinstance(event, Token):
            tokens.append(event.token)
            last = time.perf_counter()
            first = first or last
    return tokens, last - first


def _check_tie(service: Service, prompt: Prompt, adapter: str | None, ours: list[int], plain: list[int]) -> None:
    """Raise AssertionError unless two answers part where two tokens are as likely as each other."""
    place = next((i for i, pair in enumerate(zip(ours, plain, strict=False)) if pair[0] != pair[1]), None)
    assert place is not None, f"one answer ends earlier: {len(ours)} and {len(plain)} tokens"
    request = Request((*prompt.tokens, *plain[:place]), adapter, 1, logprobs=5)
    token = next(event for event in service.scheduler.submit(request) if isinstance(event, Token))
    found = dict(token.top)
    gap = abs(found.get(ours[place], float("-inf")) - found.get(plain[place], float("-inf")))
    assert gap <= TIE, f"answers part at token {place}, where the two are {gap:.3f} apart"


def first_ours(*, model: str, tokens: int, times: int) -> dict[str, Any]:
    """Seconds to the first token of a prompt that shares nothing with one before."""
    with open_service(model) as service:
        return {"seconds": [_timed_first(service, tokens, turn) for turn in range(times + 1)][1:]}


def _timed_first(service: Service, tokens: int, turn: int) -> float:
    request = Request(_prompt(tokens, turn), max_tokens=1)
    start = time.perf_counter()
    next(event for event in service.scheduler.submit(request) if isinstance(event, Token))
    return time.perf_counter() - start


def _prompt(tokens: int, turn: int) -> tuple[int, ...]:
    return tuple(1000 + (turn * 7919 + index * 31) % 20000 for index in range(tokens))


def first_theirs(*, model: str, tokens: int, times: int) -> dict[str, Any]:
    """The same by mlx_lm, in float32."""
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    network = load(model)[0]
    network.set_dtype(mx.float32)
    mx.eval(network.parameters())
    seconds = []
    for turn in range(times + 1):
        start = time.perf_counter()
        next(generate_step(mx.array(_prompt(tokens, turn)), network, max_tokens=1))
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1:]}


def bits(*, model: str, tokens: int, most: int) -> dict[str, Any]:
    """Bytes of the caches of one request, and tokens a second, by the bits of keys and values."""
    found: dict[str, Any] = {}
    for kv_bits in (None, 8, 4):
        with open_service(model, options=Options(lookup=False, kv_bits=kv_bits)) as service:
            answers = [_timed(service, Request(_prompt(tokens, turn), max_tokens=most)) for turn in range(2)]
            status = service.scheduler.status()
            answer, taken = answers[1]
            rate = (len(answer) - 1) / taken if len(answer) > 1 else None
            found[str(kv_bits)] = {"bytes": status.prompt_cache_bytes / 2, "tokens_per_second": rate}
    return found


def together(*, base: str, adapters: list[str], rows: int, times: int) -> dict[str, Any]:
    """Answers to the rows of several adapters: adapter by adapter as before, and in the same batches."""
    from mlx_lora import paths
    from mlx_lora.serve.engine import Engine
    from mlx_lora.store import registry
    from mlx_lora.store.adapter import read, wrappers_for
    from mlx_lora.study.evaluate import questions

    stored = {name: read(registry.find(name)) for name in adapters}
    engine = Engine(registry.open_base(base, list(stored.values())))
    asked = {}
    for name, adapter in stored.items():
        engine.add(name, wrappers_for(engine.loaded.model, adapter))
        folder = paths.bundled("data", "tasks", name.removeprefix("quickstart-"))
        asked[name] = questions(str(Path(folder)), Data(), engine.loaded.tokenizer, exact=True).prompts[:rows]
    each: dict[str, list[float]] = {"one by one": [], "together": []}
    same = total = 0
    for _ in range(times + 1):
        start, before = time.perf_counter(), dict[tuple[str, int], list[int]]()
        for name, prompts in asked.items():
            engine.use(name)
            before |= {(name, index): answer for index, answer in engine.batch(prompts, max_tokens=80)}
        each["one by one"].append(time.perf_counter() - start)
        start = time.perf_counter()
        requests = [Request(tuple(prompt), name, 80) for name, prompts in asked.items() for prompt in prompts]
        names = [(name, index) for name, prompts in asked.items() for index in range(len(prompts))]
        after = {names[index]: answer for index, answer in engine.together(requests)}
        each["together"].append(time.perf_counter() - start)
        same, total = sum(after[key] == answer for key, answer in before.items()), len(before)
    seconds = {label: median(found[1:]) for label, found in each.items()}
    return {**seconds, "ratio": seconds["one by one"] / seconds["together"], "same": same, "answers": total}
