"""One loaded base, any number of adapters, token ids in and out.

The engine knows nothing about templates or text. Swapping adapters exchanges modules and drops every key-value cache,
because a cache holds what another adapter computed. The thread that made the engine must use it. Prompts come without
the virtual tokens of prompt tuning: the engine puts those of the adapter in use where they belong.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_lora.adapters.attach import Wrappers, put
from mlx_lora.adapters.prompt import Prompt
from mlx_lora.data.rows import common
from mlx_lora.data.virtual import Virtual
from mlx_lora.errors import AdapterError, MlxLoraError, nearest
from mlx_lora.machine import allocation
from mlx_lora.models import finite, token_ids
from mlx_lora.models.load import LoadedModel
from mlx_lora.serve.prefill import OnPrompt, chunk_size, prefill
from mlx_lora.serve.requests import Request, Sampling
from mlx_lora.serve.together import Given, answered

with allocation.file_limits_kept():
    from mlx_lm.generate import BatchGenerator, generate_step
    from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
    from mlx_lm.sample_utils import make_sampler

__all__ = ["Cache", "Engine", "Sampling"]


@dataclass
class Cache:
    """Keys and values of a running conversation, and the tokens they stand for."""

    layers: list[Any] | None = None
    tokens: list[int] = field(default_factory=list)


def _sampler(sampling: Sampling) -> Callable[[mx.array], mx.array]:
    """mlx_lm's sampler, which marks logits that aren't finite; it seeds MLX where a seed is given."""
    if sampling.seed is not None:
        mx.random.seed(sampling.seed)
    top_p = sampling.top_p if sampling.top_p < 1 else 0.0
    return finite.marking(
        make_sampler(temp=sampling.temperature, top_p=top_p, top_k=sampling.top_k, min_p=sampling.min_p)
    )


class Engine:
    """A base and its adapters by name; `current` is the one in use, None for the bare base."""

    def __init__(self, loaded: LoadedModel):
        self.loaded = loaded
        self.adapters: dict[str, Wrappers] = {}
        self._own_ends: dict[str, frozenset[int]] = {}
        self.current: str | None = None
        self.cache = Cache()
        self.chunk = chunk_size(loaded.model)
        put(loaded.model, {})

    def add(self, name: str, wrappers: Wrappers, *, end: int | None = None) -> None:
        """Make an adapter available under a name, evaluated now so that the first swap is as fast as the others.

        `end` is a token that ends its answers too, beside those of the tokenizer.
        """
        mx.eval([wrapper.state for wrapper in wrappers.values()])
        self.adapters[name] = wrappers
        self._own_ends[name] = frozenset() if end is None else frozenset({end})

    def use(self, name: str | None) -> float:
        """Swap to an adapter, or to the bare base with None; return the milliseconds it took."""
        if name is not None and name not in self.adapters:
            raise AdapterError(f"no adapter {name!r} is loaded{nearest(name, self.adapters)}")
        start = time.perf_counter()
        put(self.loaded.model, self.adapters[name] if name is not None else {})
        self.current = name
        self.forget()
        return 1000 * (time.perf_counter() - start)

    @property
    def virtual(self) -> Virtual | None:
        """The virtual tokens of the adapter in use, if it has any."""
        wrappers = self.adapters[self.current].values() if self.current is not None else ()
        prompts = (wrapper for wrapper in wrappers if isinstance(wrapper, Prompt))
        return next((Virtual(prompt.soft.shape[0], prompt.position) for prompt in prompts), None)

    def forget(self) -> None:
        """Drop the key-value cache."""
        self.cache = Cache()

    def stream(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        first_answer: int | None = None,
        on_prompt: OnPrompt = lambda done, total: None,
    ) -> Iterator[int]:
        """Yield token ids after `prompt` until an end token (not yielded) or `max_tokens`.

        A prompt that continues the last one reuses its cache. `first_answer` is where the first answer in it starts,
        for an adapter with an infix; by default the prompt has none. `on_prompt(done, total)` tells how many of the
        prompt's tokens have been read, of those that the cache lacked. Raises MlxLoraError for an empty prompt,
        ModelError for a token that the embedding has no row for, NotFinite where logits aren't finite.
        """
        if not prompt:
            raise MlxLoraError("the prompt is empty")
        sampler = _sampler(sampling or Sampling())
        layers, rest = self._resume(self.complete(prompt, first_answer))
        try:
            with allocation.memory_limits(lean=False):
                prefill(self.loaded.model, rest[:-1], layers, on_prompt, most=self.chunk, total=len(rest))
                steps = generate_step(
                    mx.array(rest[-1:]), self.loaded.model, max_tokens=max_tokens, sampler=sampler, prompt_cache=layers
                )
                for index, (token, _) in enumerate(steps):
                    if index == 0:
                        on_prompt(len(rest), len(rest))
                    if token == finite.NOT_FINITE:
                        raise finite.error(self.loaded.model, mx.array([self.cache.tokens]))
                    self.cache.tokens.append(int(token))
                    if int(token) in self.ends:
                        return
                    yield int(token)
        except GeneratorExit:  # the consumer stopped early; the cache is consistent
            raise
        except BaseException:  # interrupted inside a pass: some layers hold more tokens than others
            self.forget()
            raise

    def read(self, prompt: Sequence[int], *, first_answer: int | None = None) -> tuple[list[Any], int]:
        """Caches that hold a prompt up to its last token, and that token; as `stream` reads it, which they belong to.

        What prompts that follow one another have in common is read once. Raises as `stream`.
        """
        layers, rest = self._resume(self.complete(prompt, first_answer))
        try:
            with allocation.memory_limits(lean=False):
                prefill(
                    self.loaded.model, rest[:-1], layers, lambda done, total: None, most=self.chunk, total=len(rest)
                )
        except BaseException:
            self.forget()
            raise
        return layers, rest[-1]

    def batch(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int = 256,
        first_answers: Sequence[int | None] | None = None,
    ) -> Iterator[tuple[int, list[int]]]:
        """Answer many prompts greedily, several at a time; yield (index of the prompt, its tokens) as they end.

        `first_answers` are the prompts' `first_answer`, as `stream` takes it. Raises as `stream` does.
        """
        places = first_answers or [None] * len(prompts)
        complete = [self.complete(prompt, place) for prompt, place in zip(prompts, places, strict=True)]
        generator = BatchGenerator(
            self.loaded.model, stop_tokens=[[end] for end in sorted(self.ends)], max_tokens=max_tokens,
            sampler=finite.marking(make_sampler(temp=0.0)),
        )  # fmt: skip
        try:
            indices = {uid: i for i, uid in enumerate(generator.insert(complete))}
            answers: dict[int, list[int]] = {uid: [] for uid in indices}
            while answers:
                responses = generator.next_generated()
                if not responses:
                    return
                for response in responses:
                    if response.token == finite.NOT_FINITE:
                        tokens = complete[indices[response.uid]] + answers[response.uid]
                        raise finite.error(self.loaded.model, mx.array([tokens]))
                    if response.token not in self.ends:
                        answers[response.uid].append(int(response.token))
                    if response.finish_reason is not None:
                        yield indices[response.uid], answers.pop(response.uid)
        finally:
            generator.close()

    def together(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[int]]]:
        """Answer requests that name adapters of this engine, or the base, in common batches.

        Yields (index of the request, its tokens) as they end. Raises as `serve.together.answered`.
        """
        if not requests:
            return
        current = self.current
        named = {request.adapter for request in requests}
        given = {
            name: Given(wrappers, next(iter(self._own_ends[name]), None))
            for name, wrappers in self.adapters.items()
            if name in named
        }
        try:
            yield from answered(self.loaded, requests, given)
        finally:
            self.use(current)

    @property
    def ends(self) -> set[int]:
        """Token ids that end an answer."""
        own = self._own_ends[self.current] if self.current is not None else frozenset()
        return set(self.loaded.tokenizer.eos_token_ids) | own

    def complete(self, prompt: Sequence[int], first_answer: int | None = None) -> list[int]:
        """A prompt with the virtual tokens of the adapter in use. Raises ModelError as `stream`."""
        token_ids.check(self.loaded.tokenizer, prompt)
        virtual = self.virtual
        return virtual.prompt(prompt, first_answer) if virtual else list(prompt)

    def _resume(self, prompt: list[int]) -> tuple[list[Any], list[int]]:
        """A cache holding a beginning of `prompt`, and the tokens it lacks (at least one)."""
        kept = min(common(self.cache.tokens, prompt), len(prompt) - 1)
        layers = self.cache.layers
        computed = self._length(layers)
        if layers is None or not kept or computed < kept or not self._trim(layers, computed - kept):
            layers, kept = make_prompt_cache(self.loaded.model), 0
        self.cache = Cache(layers, list(prompt))
        return layers, prompt[kept:]

    @staticmethod
    def _length(layers: list[Any] | None) -> int:
        return int(getattr(layers[0], "offset", 0)) if layers else 0

    @staticmethod
    def _trim(layers: list[Any], count: int) -> bool:
        return count == 0 or (can_trim_prompt_cache(layers) and trim_prompt_cache(layers, count) == count)
