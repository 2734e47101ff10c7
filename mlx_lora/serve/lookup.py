"""Prompt lookup: what an answer copies is drafted out of the prompt, and one forward pass verifies several tokens.

Where the last tokens have stood before, what followed them there is the draft. A pass over the last token and the draft
gives the token that belongs behind each of them: the draft holds as far as it agrees. So a greedy answer is what it
would be without drafts, but for tokens that are as likely as each other. How long a draft is follows from how often the
row's drafts held and from what a pass of so many tokens takes on this machine: measured at the start, then on the way.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora.machine import allocation
from mlx_lora.serve.prompt_cache import trimmable_up_to
from mlx_lora.serve.ways import TOLERANCES, divergence, log_probabilities

with allocation.file_limits_kept():
    from mlx_lm.models.cache import make_prompt_cache

# Tokens that must have stood before, the longest first.
GRAMS = (4, 3, 2)
# Tokens of a draft at most.
MOST = 15
# How likely a drafted token holds before any was tried, how much one more says, and what is believed at most.
START, WEIGHT, SUREST = 0.3, 0.15, 0.97
# How many times faster drafts must promise to be: smaller gains are lost in moving the row to and fro.
GAIN = 1.5
# Seconds that a draft takes beside its pass: in Python, and in moving the row. Much for a model whose passes are short.
BESIDE = 2e-3
# Passes of so many tokens are measured, until that many were or so many seconds are over.
MEASURED, TIMES, SECONDS = (1, 4, MOST + 1), 4, 0.1
# A measured time moves what is believed by this much.
NEWS = 0.2
# What is worth how long a draft is found anew after so many measured times.
FORGET = 16
# The same for how many of the tokens that drafts promised came out of them.
NEWS_OF_DRAFTS = 0.1
# What is read first, and what is drafted rightly.
PROMPT, ANSWER = (5, 17, 3, 41, 8, 29, 11, 23, 2, 37, 19, 7), (31, 4, 12, 27)

MakeCache = Callable[[nn.Module], list[Any]]


class Passes:
    """Seconds of a forward pass of one row by its number of tokens, out of those that were measured."""

    def __init__(self, seconds: dict[int, float]):
        self.kept = 1.0  # the part of what drafts promised that they kept
        self._bests: dict[tuple[float, int], tuple[int, float]] = {}  # asked for every token, and rarely another
        self._news = 0
        self._seconds = dict(seconds)
        self._known = sorted(seconds)

    def seconds(self, tokens: int) -> float:
        """Of a pass of so many tokens, at least 1; between two that were measured, on the line through them."""
        place = max(1, min(bisect_left(self._known, tokens), len(self._known) - 1))
        low, high = self._known[place - 1], self._known[place]
        part = (tokens - low) / (high - low)
        return (1 - part) * self._seconds[low] + part * self._seconds[high]

    def saw(self, tokens: int, seconds: float) -> None:
        """Note what a pass took. One that took far longer than believed is another program's doing."""
        believed = self.seconds(tokens)
        if tokens not in self._seconds:
            self._known = sorted([*self._known, tokens])
        self._seconds[tokens] = believed + NEWS * (min(seconds, 3 * believed) - believed)
        self._news += 1
        if self._news % FORGET == 0:
            self._bests.clear()

    def kept_of(self, rate: float, drafted: int, made: int) -> None:
        """Note how many tokens were made with a draft that was taken for right with `rate` a token.

        Tokens of a text that isn't copied are wrong together, so that long drafts keep less than they promise.
        """
        promised = sum(rate**count for count in range(drafted + 1))
        self.kept += NEWS_OF_DRAFTS * (min(made / promised, 1.5) - self.kept)

    def best(self, rate: float, most: int) -> tuple[int, float]:
        """How many tokens to draft if each holds with probability `rate`, and how many times faster that makes it.

        Of a draft of k tokens 1 + rate + … + rate^k come out of a pass. (0, 1) where drafts don't pay.
        """
        asked = (round(rate, 2), most)
        if asked not in self._bests:
            self._bests[asked] = self._best(*asked)
        return self._bests[asked]

    def _best(self, rate: float, most: int) -> tuple[int, float]:
        alone, tokens, power, best = self.seconds(1), 1.0, 1.0, (0, 1.0)
        for count in range(1, most + 1):
            power *= rate
            tokens += power
            gain = self.kept * tokens * alone / (self.seconds(count + 1) + BESIDE)
            if gain > best[1]:
                best = (count, gain)
        return best


class Lookup:
    """The tokens of one row, where each of their short sequences stood last, and how often what followed held.

    `tokens` are the prompt and what is answered so far; ids below 0 are virtual and never drafted. `rate` is how likely
    a token is taken to hold before any has shown it.
    """

    def __init__(self, tokens: Sequence[int], rate: float | None = None):
        self.rate = START if rate is None else rate
        self._tokens: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}  # where the text behind a sequence begins
        self._next: int | None = None  # where the next token stands if the answer copies
        for token in tokens:
            self._append(token)

    def push(self, token: int) -> None:
        """The next token of the answer, drafted or not."""
        if self._next is not None:
            self.rate += WEIGHT * ((self._tokens[self._next] == token) - self.rate)
        self._append(token)

    def _append(self, token: int) -> None:
        copied = self._next is not None and self._tokens[self._next] == token
        self._tokens.append(token)
        found = None
        for length in GRAMS:
            sequence = tuple(self._tokens[-length:])
            found = self._behind.get(sequence) if found is None else found
            if len(sequence) == length:
                self._behind[sequence] = len(self._tokens)
        self._next = self._next + 1 if copied and self._next is not None else found

    def draft(self, passes: Passes, most: int) -> list[int]:
        """At most `most` tokens that may come next; none where verifying them isn't worth it."""
        if self._next is None or most < 1:
            return []
        count, gain = passes.best(min(self.rate, SUREST), min(most, MOST))
        if gain < GAIN:
            return []
        drafted: list[int] = []
        for place in range(self._next, self._next + count):  # a draft may copy itself: what repeats goes on
            token = self._tokens[place] if place < len(self._tokens) else drafted[place - len(self._tokens)]
            if token < 0:
                break
            drafted.append(token)
        return drafted


def find_passes(
    model: nn.Module, name: str, make_cache: Callable[[nn.Module], list[Any]] | None = None
) -> Passes | str:
    """What passes of several tokens take on this model, or why it answers without lookup, by `name`.

    `model` has no adapters. A few tokens are drafted, taken back and read again: the rest must be what it is otherwise.
    """
    new = make_cache or make_prompt_cache
    cache = new(model)
    if trimmable_up_to(cache) < len(PROMPT) + 2 * MOST:
        return f"{name}: answers are made without lookup, because its caches can't take tokens back"
    try:
        if (away := _taken_back(model, new)) > TOLERANCES[_half(model)]:
            return f"{name}: answers are made without lookup, which is off by a KL divergence of {away:.2g}"
        _read(model, PROMPT, cache)
        passes = Passes({count: _seconds(model, cache, count) for count in MEASURED})
    except Exception as error:  # a model or a cache may raise anything when tokens are taken back
        return f"{name}: answers are made without lookup, because {type(error).__name__} is raised ({error})"
    if passes.best(SUREST, MOST)[1] < GAIN:
        return f"{name}: answers are made without lookup, because a pass of several tokens takes as long as several"
    return passes


def _half(model: nn.Module) -> bool:
    return any(array.dtype in (mx.float16, mx.bfloat16) for _, array in tree_flatten(model.parameters()))


def _read(model: nn.Module, tokens: Sequence[int], cache: list[Any]) -> mx.array:
    """Log-probabilities (T, V) behind each token."""
    found = log_probabilities(model(mx.array([tokens]), cache=cache)[0])
    mx.eval(found, [layer.state for layer in cache])
    return found


def take_back(cache: list[Any], count: int) -> None:
    """Take the last `count` tokens out of caches that can be trimmed."""
    for layer in cache if count else ():
        layer.trim(count)


def _taken_back(model: nn.Module, new: MakeCache) -> float:
    """The divergence of tokens that are verified behind drafts that were wrong, from the same tokens one by one."""
    plain, drafted = new(model), new(model)
    _read(model, PROMPT, plain)
    _read(model, PROMPT, drafted)
    expected = mx.concatenate([_read(model, [token], plain) for token in ANSWER])
    found = [_read(model, [*ANSWER[:2], *reversed(PROMPT[:5])], drafted)[:2]]
    take_back(drafted, 5)
    found.append(_read(model, ANSWER[2:], drafted))
    return divergence(mx.concatenate(found), expected)


def _seconds(model: nn.Module, cache: list[Any], count: int) -> float:
    """What a pass of `count` tokens takes at best; the first one, which compiles, isn't counted."""
    tokens, taken, start = (PROMPT * 2)[:count], list[float](), time.perf_counter()
    while len(taken) < TIMES and (len(taken) < 2 or time.perf_counter() - start < SECONDS):
        before = time.perf_counter()
        _read(model, tokens, cache)
        taken.append(time.perf_counter() - before)
        take_back(cache, count)
    return min(taken[1:])
