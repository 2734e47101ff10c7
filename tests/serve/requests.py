"""Requests on a tiny model, and what each of them gives by itself: the reference is the model without any batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_lora.adapters.attach import Wrappers, build, put
from mlx_lora.config import Adapter
from mlx_lora.serve.requests import Request
from mlx_lora.serve.residence import Residence
from mlx_lora.serve.sampling import sampler

# Two tokens whose log-probabilities are as near as this may change places: sums are rounded in another order.
TIE = 0.05
Adapters = dict[str | None, Wrappers]


def random_adapter(model: nn.Module, seed: int, *, size: float = 0.3, **settings: Any) -> Wrappers:
    """An adapter whose arrays are random and large enough to change every answer."""
    wrappers = build(model, Adapter(**settings), seed=seed)
    for index, wrapper in enumerate(wrappers.values()):
        for number, name in enumerate(wrapper.adapter_params()):
            key = mx.random.key(10_000 * seed + 10 * index + number)
            start = wrapper[name] if name in ("vector", "m") else 0
            wrapper[name] = start + size * mx.random.normal(wrapper[name].shape, key=key)
    return wrappers


def giving(makers: dict[str, Callable[[nn.Module], Wrappers]]) -> Callable[[Residence], None]:
    """What prepares a scheduler: adapters that are made in its thread."""

    def prepare(residence: Residence) -> None:
        for name, make in makers.items():
            residence.give(name, make(residence.loaded.model))

    return prepare


def prompt(length: int, seed: int = 0, most: int = 90) -> tuple[int, ...]:
    return tuple(mx.random.randint(1, most, (length,), key=mx.random.key(31 * length + seed)).tolist())  # type: ignore[arg-type]


def by_itself(model: nn.Module, wrappers: Wrappers, request: Request, ends: Sequence[int]) -> list[int]:
    """The answer of one row, one token at a time, on the model with one adapter."""
    put(model, wrappers)
    choose, cache = sampler(request.sampling), make_prompt_cache(model)
    tokens, answer = mx.array([request.tokens]), list[int]()
    while len(answer) < request.max_tokens:
        logits = model(tokens, cache=cache)[:, -1, :]
        token = int(choose(logits - mx.logsumexp(logits, axis=-1, keepdims=True)).item())
        if token in ends:
            break
        answer.append(token)
        tokens = mx.array([[token]])
    put(model, {})
    return answer


def assert_same_or_tied(
    model: nn.Module, wrappers: Wrappers, request: Request, found: list[int], own: list[int]
) -> None:
    """The same answer, or one that parts from it where two tokens are as likely as each other; greedy only."""
    shared = next((index for index, pair in enumerate(zip(found, own, strict=False)) if pair[0] != pair[1]), None)
    if shared is None:
        assert len(found) == len(own), (found, own)
        return
    put(model, wrappers)
    logits = model(mx.array([[*request.tokens, *own[:shared]]]))[0, -1]
    put(model, {})
    apart = abs((logits[found[shared]] - logits[own[shared]]).item())
    assert apart <= TIE, f"parts at token {shared}, where the two are {apart:.3f} apart: {found} {own}"
