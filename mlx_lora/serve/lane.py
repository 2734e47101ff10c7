"""A lane: rows that can share a forward pass, and the generator that runs them.

One lane has the rows of the base and of all adapters that join (`adapters.mixed`); each other adapter has a lane of its
own. How many rows a lane runs together is what the trial of its model allows (`serve.ways`).
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import mlx.core as mx

from mlx_lora.errors import AdapterError
from mlx_lora.machine import allocation
from mlx_lora.models import finite
from mlx_lora.serve.alone import OneRowGenerator
from mlx_lora.serve.prompt_cache import trimmable
from mlx_lora.serve.requests import Deliver, Finished, Reading, Request, Token
from mlx_lora.serve.residence import Held
from mlx_lora.serve.rows import RowsEntry, RowsModel
from mlx_lora.serve.sampling import Drawing, sampler
from mlx_lora.serve.ways import ALONE, Way

with allocation.file_limits_kept():
    from mlx_lm.generate import BatchGenerator, StopSequences
    from mlx_lm.models.cache import make_prompt_cache

# Tokens of a chunk of one row, at least, where several share what a pass may read.
LEAST_CHUNK = 16
# Rows whose prompts are read together.
PROMPTS = 8


@dataclass(eq=False)
class Row:
    """A request on its way. `prompt` has the virtual tokens of its adapter, `answer` all tokens that were chosen.

    The answer has at most `most` tokens; `shown` of them have been delivered. A `suspect` was in a pass that failed: it
    runs by itself until it has made a token. While `loading` its adapter is on the way. Where caches are `untrimmable`,
    those of the row's beginning are kept. `begun` is when it came into its lane.
    """

    request: Request
    deliver: Deliver
    held: Held | None = None
    prompt: list[int] = field(default_factory=list)
    answer: list[Token] = field(default_factory=list)
    begun: float = 0.0
    ends: frozenset[int] = frozenset()
    most: int = 0
    shown: int = 0
    cached: int = 0
    uid: int | None = None
    suspect: bool = False
    loading: bool = False
    untrimmable: bool = False
    error: BaseException | None = None
    sample: Any = None

    @property
    def key(self) -> Hashable | None:
        return self.held.key if self.held else None

    @property
    def tokens(self) -> list[int]:
        return self.prompt + [token.token for token in self.answer]

    def finished(self, reason: str) -> Finished:
        return Finished(reason, len(self.prompt), self.cached, len(self.answer))


@dataclass(frozen=True)
class Ended:
    """A row that left a lane, with the caches that it left behind and the tokens that they hold."""

    row: Row
    reason: str
    layers: list[Any] | None = None
    tokens: Sequence[int] = ()


@dataclass(frozen=True)
class Kept:
    """Caches of the beginning of a row that goes on; `tokens` are what they hold."""

    row: Row
    layers: list[Any]
    tokens: Sequence[int]


class Lane:
    """`adapter` is that of a lane of its own, None for the lane of all that join."""

    def __init__(self, model: RowsModel, way: Way, *, adapter: Held | None, rows: int, chunk: int):
        self.model, self.way, self.adapter, self.chunk = model, way, adapter, chunk
        self.rows: dict[int, Row] = {}
        self.most = 1 if way.rows == ALONE else rows
        self._generator: Any = None

    @property
    def generator(self) -> Any:
        """Made when the first row comes: in the thread that runs it."""
        if self._generator is None:
            if self.way.rows == ALONE:
                self._generator = OneRowGenerator(self.model, prefill_step_size=self.chunk)
            else:
                self._generator = BatchGenerator(
                    self.model, completion_batch_size=self.most, prefill_batch_size=min(self.way.prompts, self.most),
                    prefill_step_size=self.chunk, stream=mx.default_stream(mx.default_device()),
                )  # fmt: skip
        return self._generator

    def takes(self, row: Row) -> bool:
        """Whether there is room; a row that is suspected to make passes fail gets the lane for itself."""
        suspected = row.suspect or any(other.suspect for other in self.rows.values())
        return len(self.rows) < self.most and not (suspected and self.rows)

    def insert(self, row: Row, layers: list[Any] | None, cached: int, shared: int = 0) -> None:
        """Begin a row at its tokens after the first `cached` ones, which `layers` hold.

        Where caches can't be trimmed, the row stops after `shared` tokens and before its last one, so that its
        caches can be kept.
        """
        tokens, layers = row.tokens, layers or make_prompt_cache(self.model.model)
        row.untrimmable = not trimmable(layers, len(tokens))
        places = sorted({place for place in (shared, len(tokens) - 1) if cached < place < len(tokens)})
        edges = [cached, *(places if row.untrimmable else []), len(tokens)]
        row.cached, row.sample = cached, sampler(row.request.sampling)
        if isinstance(row.sample, Drawing):
            row.sample.drawn = len(row.answer)
        ends = [(end,) for end in sorted(row.ends)]
        (row.uid,) = self.generator.insert_segments(
            [[tokens[start:end] for start, end in pairwise(edges)]],
            max_tokens=[row.most - len(row.answer)],
            caches=[[RowsEntry([row.key]), *layers]],
            all_tokens=[tokens[:cached]],
            samplers=[row.sample],
            logits_processors=[[_GuardedProcessor(row, one) for one in row.request.processors]],
            stop_sequences=[StopSequences([*ends, *row.request.stop])],
        )
        self.rows[row.uid], row.begun = row, time.monotonic()

    def step(self) -> Iterator[Ended | Kept]:
        """One pass: deliver what it gave, yield the rows that it ended, and what is worth keeping of others."""
        reading = sum(not row.answer for row in self.rows.values())
        if self.rows:  # what a pass reads is bounded, however many prompts are read at once
            share = self.chunk // max(min(reading, self.way.prompts), 1)
            self.generator.prefill_step_size = max(share, min(LEAST_CHUNK, self.chunk))
        prompts, responses = self.generator.next()
        for response in prompts:
            row = self.rows.get(response.uid)
            if row is not None and not row.answer and response.progress:
                done, total = response.progress
                row.deliver(Reading(row.cached + done, row.cached + total))
                if row.untrimmable and response.end_of_segment and done < total:
                    layers, tokens = self.generator.extract_cache([row.uid])[row.uid]
                    yield Kept(row, list(layers[1:]), list(tokens))
        for response in responses:
            if ended := self._take(self.rows[response.uid], response):
                yield ended

    def _take(self, row: Row, response: Any) -> Ended | None:
        """Take a row's next token."""
        if row.error is None and response.token == finite.NOT_FINITE:
            row.error = self._not_finite(row)
        if row.error is not None:
            self.remove(row)
            return Ended(row, "failed")
        row.suspect = False
        token = int(response.token)
        if token not in row.ends:
            row.answer.append(_token(token, response.logprobs, row.request.logprobs))
        reason = response.finish_reason
        self._show(row, final=reason is not None, stopped=reason == "stop" and token not in row.ends)
        if reason is None:
            return None
        del self.rows[response.uid]
        return Ended(row, reason, response.prompt_cache[1:], response.all_tokens)

    def _not_finite(self, row: Row) -> BaseException:
        """What to say of a row whose logits are NaN or infinite."""
        tokens = mx.array([row.tokens[: finite.POSITIONS]])
        with self.model.publish([row.key], tokens.shape[1]):
            return finite.error(self.model.model, tokens)

    @staticmethod
    def _show(row: Row, *, final: bool, stopped: bool) -> None:
        """Deliver tokens that can't become part of a stop sequence any more."""
        tokens = [token.token for token in row.answer]
        if stopped:
            matched = max(len(stop) for stop in row.request.stop if tuple(tokens[-len(stop) :]) == stop)
            del row.answer[-matched:]
        held_back = 0 if final else beginning_of(row.request.stop, tokens)
        upto = len(row.answer) - held_back
        for token in row.answer[row.shown : upto]:
            row.deliver(token)
        row.shown = max(row.shown, upto)

    def remove(self, row: Row, *, keep: bool = False) -> tuple[list[Any], list[int]] | None:
        """Take a row out of the batch at once; with `keep` return its caches and the tokens that they hold."""
        if row.uid is None or self.rows.get(row.uid) is not row:
            return None
        del self.rows[row.uid]
        try:
            found = self.generator.remove([row.uid], return_prompt_caches=True) if keep else {}
        except Exception:  # caches of rows that have read nothing yet may have nothing to give
            found = {}
        self.generator.remove([row.uid])
        if row.uid not in found:
            return None
        layers, tokens = found[row.uid]
        return list(layers[1:]), list(tokens)

    def abandon(self) -> list[Row]:
        """Give up the generator after a pass that failed: some of its caches hold more tokens than others."""
        rows = list(self.rows.values())
        self.rows = {}
        self.close()
        return rows

    def close(self) -> None:
        if self._generator is not None:
            self._generator.close()
            self._generator = None

    @contextmanager
    def only_own(self, keys: Sequence[Hashable | None], tokens: int) -> Iterator[None]:
        """`rows.Publish` of a lane with one adapter, which is on the model itself."""
        own = self.adapter.key if self.adapter else None
        if wrong := [key for key in keys if key != own]:
            raise AdapterError(f"a row of adapter {wrong[0]!r} is in the lane of {own!r}")
        yield


def _token(token: int, log_probabilities: mx.array, count: int | None) -> Token:
    if count is None:
        return Token(token)
    count = min(count, log_probabilities.size)
    top: list[int] = mx.argsort(-log_probabilities)[:count].tolist() if count else []  # type: ignore[assignment]
    values: list[float] = log_probabilities[mx.array([token, *top])].tolist()  # type: ignore[assignment]
    return Token(token, values[0], tuple(zip(top, values[1:], strict=True)))


def beginning_of(stops: Sequence[tuple[int, ...]], tokens: Sequence[int]) -> int:
    """How many of the last tokens are the beginning of a stop sequence."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for count in range(min(longest, len(tokens)), 0, -1):
        if any(len(stop) > count and tuple(tokens[-count:]) == stop[:count] for stop in stops):
            return count
    return 0


class _GuardedProcessor:
    """A processor whose error ends its own row: raised inside a pass it would end all of them."""

    def __init__(self, row: Row, processor: Any):
        self._row, self._processor = row, processor

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        if self._row.error is not None:
            return logits
        try:
            found = self._processor(tokens, logits)
            if found.shape != logits.shape:
                raise ValueError(f"a logits processor made {found.shape} of {logits.shape}")
            return found  # type: ignore[no-any-return]
        except Exception as error:
            self._row.error = error
            return logits
