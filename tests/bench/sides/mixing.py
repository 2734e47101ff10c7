"""Seconds of batches of requests on SmolLM2, each with its own adapter of rank 16 on all linears, and of their rivals.

Every comparison is of batches in one process, in turn, and of the fastest of each: another program that computes for a
while makes some of them slower, and none faster. Prompts differ and are never taken from a cache. Adapters are random,
which takes the same time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

RANK, LARGE_RANK = 16, 64
PROMPT, ANSWER = 32, 16
Batch = Callable[[], float]


def rows(*, model: str, count: int, runs: int) -> dict[str, Any]:
    """`count` requests at once, all with one adapter and each with its own, and the first eight of them in turn."""
    with _scheduler(model, count) as running:

        def mixed() -> float:
            return _together(running, [f"{index}" for index in range(count)])

        def same() -> float:
            return _together(running, ["0"] * count)

        def in_turn() -> float:
            return sum(_together(running, [f"{index}"]) for index in range(8)) * count / 8

        found = _in_turn({"mixed": mixed, "same": same}, runs) | _in_turn({"single": in_turn}, max(runs // 4, 1))
    return _figures(found, count) | {
        "mixed_of_same": _ratio(found["same"], found["mixed"]),
        "mixed_of_single": _ratio(found["single"], found["mixed"]),
    }


def held(*, model: str, runs: int, few: int = 8, many: int = 100) -> dict[str, Any]:
    """Eight requests of eight adapters, where those are all that is held and where a hundred are, one of rank 64."""
    with _scheduler(model, few) as small, _scheduler(model, many) as large:
        names = [f"{index}" for index in range(few)]
        found = _in_turn({"few": lambda: _together(small, names), "many": lambda: _together(large, names)}, runs)
        nbytes = {"few": small.status().adapter_bytes, "many": large.status().adapter_bytes}
    return _figures(found, few) | {"many_over_few": _ratio(found["many"], found["few"]), "adapter_bytes": nbytes}


def _scheduler(model: str, count: int) -> Any:
    from mlx_lora.models.load import LoadedModel, load
    from mlx_lora.models.unpack import unpack_once
    from mlx_lora.serve.residence import Residence
    from mlx_lora.serve.scheduler import Limits, Scheduler

    def opened() -> LoadedModel:
        loaded = load(model)
        unpack_once(loaded)
        return loaded

    def prepare(residence: Residence) -> None:
        for index in range(count):
            rank = LARGE_RANK if index == 99 else RANK
            residence.give(f"{index}", _adapter(residence.loaded.model, index, rank))

    limits = Limits(rows=32, prompt_cache_bytes=0, adapter_bytes=8 << 30)
    return Scheduler(opened, limits=limits, prepare=prepare)


def _adapter(model: nn.Module, seed: int, rank: int) -> Any:
    from mlx_lora.adapters.attach import build
    from mlx_lora.config import Adapter

    wrappers = build(model, Adapter(rank=rank, targets="all-linear"), seed=seed)
    for index, wrapper in enumerate(wrappers.values()):
        wrapper.lora_b = 0.01 * mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(1000 * seed + index))
    return wrappers


def _together(running: Any, names: list[str]) -> float:
    """Seconds until requests of these adapters, all at once, are answered."""
    from mlx_lora.serve.requests import Request

    prompts = [tuple(1000 + 40 * row + place for place in range(PROMPT)) for row in range(len(names))]
    start = time.perf_counter()
    requests = [
        Request(prompt, name, max_tokens=ANSWER, processors=(_never_ends,))
        for name, prompt in zip(names, prompts, strict=True)
    ]
    answers = [running.submit(request) for request in requests]
    counts = [len(answer.tokens()) for answer in answers]
    assert counts == [ANSWER] * len(names), counts
    return time.perf_counter() - start


def _never_ends(tokens: mx.array, logits: mx.array) -> mx.array:
    """Logits without SmolLM2's end tokens, so that all answers are equally long."""
    return logits.at[:, mx.array([0, 2])].add(-1e9)


def _in_turn(batches: dict[str, Batch], runs: int) -> dict[str, list[float]]:
    """Seconds of every batch, `runs` times in turn, after a first time that doesn't count."""
    for batch in batches.values():
        batch()
    found: dict[str, list[float]] = {name: [] for name in batches}
    for _ in range(runs):
        for name, batch in batches.items():
            found[name].append(batch())
    return found


def _ratio(above: list[float], below: list[float]) -> float:
    """The seconds of one batch by those of another."""
    return min(above) / min(below)


def _figures(found: dict[str, list[float]], count: int) -> dict[str, Any]:
    return {
        "tokens_per_second": {name: count * ANSWER / min(values) for name, values in found.items()},
        "peak_bytes": mx.get_peak_memory(),
        "rows": count,
    }
