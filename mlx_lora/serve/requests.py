"""What the scheduler is asked, and what it answers: plain values that may cross threads.

Tokens go in and come out; nothing here knows templates or text. Events reach the thread that asked through a queue, or
through a function of its own.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx

from mlx_lora.errors import MlxLoraError, Stopped

# Seconds between two looks at whether the scheduler still runs, while a waiter has nothing to read.
LOOK = 0.5


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy. `top_p` of 1, `top_k` of 0 and `min_p` of 0 keep the whole distribution.

    Two requests with the same seed and prompt get the same tokens, whatever else is answered at the same time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        faults = []
        if not 0 <= self.temperature < float("inf"):
            faults.append(f"temperature is {self.temperature:g}, at least 0 is needed")
        if not 0 < self.top_p <= 1:
            faults.append(f"top_p is {self.top_p:g}, above 0 and at most 1 is needed")
        if not 0 <= self.min_p <= 1:
            faults.append(f"min_p is {self.min_p:g}, 0 to 1 is needed")
        if self.top_k < 0:
            faults.append(f"top_k is {self.top_k}, at least 0 is needed")
        if faults:
            raise MlxLoraError("; ".join(faults))


class Processor(Protocol):
    """Changes a row's logits before a token is chosen, such as a grammar or a penalty. Runs in the scheduler's thread.

    It is called with all tokens so far (T,), prompt included, and logits (1, V). Its answer must follow from these
    alone: a row may begin again at its last token. One that raises ends its row and no other.
    """

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array: ...


@dataclass(frozen=True)
class Request:
    """One prompt to answer.

    adapter        its name, None for the base
    max_tokens     of the answer
    stop           sequences of tokens that end the answer and aren't part of it, beside the model's end tokens
    processors     applied in this order to the logits of this row
    logprobs       None, or how many of the most likely tokens are told with each token, with their log-probabilities
    first_answer   where the first answer in `tokens` starts, for an adapter with an infix
    """

    tokens: tuple[int, ...]
    adapter: str | None = None
    max_tokens: int = 256
    sampling: Sampling = Sampling()
    stop: tuple[tuple[int, ...], ...] = ()
    processors: tuple[Processor, ...] = ()
    logprobs: int | None = None
    first_answer: int | None = None

    def __post_init__(self) -> None:
        if not self.tokens:
            raise MlxLoraError("the prompt is empty")
        if self.max_tokens < 1:
            raise MlxLoraError(f"max_tokens is {self.max_tokens}, at least 1 is needed")
        if not all(self.stop):
            raise MlxLoraError("a stop sequence is empty")


@dataclass(frozen=True)
class Reading:
    """`done` of `total` prompt tokens have been read; those from the prompt cache count as read."""

    done: int
    total: int


@dataclass(frozen=True)
class Token:
    """One token of the answer. `logprob` and `top`, (token, log-probability) of the most likely ones, where asked."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Finished:
    """The answer's end. `reason` is stop (an end token or a stop sequence), length, or cancelled."""

    reason: str
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int


@dataclass(frozen=True)
class Failed:
    """The end of a request that has no answer, or no more of it."""

    error: BaseException


Event = Reading | Token | Finished | Failed
Deliver = Callable[[Event], None]


@dataclass
class Answer:
    """The waiting side of a request: iterate for its events. Any thread may cancel it, at any time and repeatedly."""

    request: Request
    cancel: Callable[[], None]
    alive: Callable[[], bool]
    events: queue.SimpleQueue[Event] = field(default_factory=queue.SimpleQueue)

    def __iter__(self) -> Iterator[Event]:
        """Events up to Finished. Raises what the request failed with, and Stopped when the scheduler is gone."""
        while True:
            event = self.next()
            if isinstance(event, Failed):
                raise event.error
            yield event
            if isinstance(event, Finished):
                return

    def next(self, timeout: float | None = None) -> Event:
        """The next event. Raises TimeoutError after `timeout` seconds, and Stopped when the scheduler is gone."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            wait = LOOK if end is None else min(LOOK, max(end - time.monotonic(), 0))
            try:
                return self.events.get(timeout=wait)
            except queue.Empty:
                pass
            if not self.alive() and self.events.empty():
                raise Stopped("the thread that generates has ended", hint="start again")
            if end is not None and time.monotonic() >= end:
                raise TimeoutError(f"no event within {timeout:g} s")

    def tokens(self) -> list[int]:
        """All tokens of the answer, once it is complete."""
        return [event.token for event in self if isinstance(event, Token)]
