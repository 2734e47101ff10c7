"""A lane: rows that can share a forward pass, and the generator that runs them.

One lane has the rows of the base and of all adapters that join (`adapters.mixed`); each other adapter has a lane of its
own. How many rows a lane runs together is what the trial of its model allows (`serve.ways`). A greedy row that is by
itself has its tokens drafted (`serve.lookup`) while that is worth it: it leaves the batch, and returns to it when
another row comes or the drafts fail.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import mlx.core as mx

from mlx_lora.errors import AdapterError
from mlx_lora.machine import allocation
from mlx_lora.models import finite
from mlx_lora.serve.alone import OneRowGenerator
from mlx_lora.serve.lookup import MOST, Lookup, Passes, take_back
from mlx_lora.serve.prompt_cache import trimmable, trimmable_up_to
from mlx_lora.serve.requests import Reading
from mlx_lora.serve.residence import Held
from mlx_lora.serve.rows import RowsEntry, RowsModel
from mlx_lora.serve.running import Ended, Kept, Row, as_token, beginning_of, guarded
from mlx_lora.serve.sampling import Drawing, sampler
from mlx_lora.serve.ways import ALONE, Way

with allocation.file_limits_kept():
    from mlx_lm.generate import BatchGenerator, StopSequences
    from mlx_lm.models.cache import make_prompt_cache

# Tokens of a chunk of one row, at least, where several share what a pass may read.
LEAST_CHUNK = 16
# Passes without a draft after which a row returns to the batch, whose passes don't wait for each other's tokens.
IDLE = 8


class Lane:
    """`adapter` is that of a lane of its own, None for the lane of all that join.

    `passes` is what passes of several tokens take, None to draft nothing; `drafted` tokens were verified, and `held` of
    them were right. `make_cache` makes the caches of a row. `throughput` as `status.Options` has it.
    """

    def __init__(
        self, model: RowsModel, way: Way, *, adapter: Held | None, rows: int, chunk: int,
        passes: Passes | None = None, make_cache: Callable[[Any], list[Any]] | None = None, throughput: bool = False,
    ):  # fmt: skip
        self.model, self.way, self.adapter, self.chunk, self.passes = model, way, adapter, chunk, passes
        self.make_cache, self.throughput = make_cache or make_prompt_cache, throughput
        self.rows: dict[int, Row] = {}
        self.most = 1 if way.rows == ALONE else rows
        self.drafted = self.held = 0
        self._generator: Any = None
        self._drafting: Any = None  # the generator of a row that left the batch; in a lane of one row, the generator
        self._idle = 0
        self._trimmable = trimmable_up_to(self.make_cache(model.model)) if passes is not None else 0

    @property
    def generator(self) -> Any:
        """Made when the first row comes: in the thread that runs it."""
        if self._generator is None:
            if self.way.rows == ALONE:
                self._generator = self._drafting = self._one_row()
            else:
                self._generator = BatchGenerator(
                    self.model, completion_batch_size=self.most, prefill_batch_size=min(self.way.prompts, self.most),
                    prefill_step_size=self.chunk, stream=mx.default_stream(mx.default_device()),
                )  # fmt: skip
        return self._generator

    def _one_row(self) -> OneRowGenerator:
        return OneRowGenerator(self.model, prefill_step_size=self.chunk, passes=self.passes)

    def _of(self, uid: int) -> Any:
        """The generator that has a row."""
        return self._drafting if uid < 0 else self.generator

    def takes(self, row: Row) -> bool:
        """Whether there is room; a row that is suspected to make passes fail gets the lane for itself."""
        suspected = row.suspect or any(other.suspect for other in self.rows.values())
        return len(self.rows) < self.most and not (suspected and self.rows)

    def insert(self, row: Row, layers: list[Any] | None, cached: int, shared: int = 0) -> None:
        """Begin a row at its tokens after the first `cached` ones, which `layers` hold.

        Where caches can't be trimmed, the row stops after `shared` tokens and before its last one, so that its
        caches can be kept.
        """
        tokens, layers = row.tokens, layers or self.make_cache(self.model.model)
        row.untrimmable = not trimmable(layers, len(tokens))
        places = sorted({place for place in (shared, len(tokens) - 1) if cached < place < len(tokens)})
        edges = [cached, *(places if row.untrimmable else []), len(tokens)]
        row.cached, row.read, row.begun = cached, 0, time.monotonic()
        row.sample = sampler(row.request.sampling)
        if isinstance(row.sample, Drawing):
            row.sample.drawn = len(row.answer)
        self._begin(self.generator, row, layers, edges)

    def _begin(self, generator: Any, row: Row, layers: list[Any], edges: list[int]) -> None:
        """Give a row to a generator, to be read from the first edge, which `layers` reach, in segments up to each."""
        tokens, ends = row.tokens, [(end,) for end in sorted(row.ends)]
        (row.uid,) = generator.insert_segments(
            [[tokens[start:end] for start, end in pairwise(edges)]],
            max_tokens=[row.most - len(row.answer)],
            caches=[[RowsEntry([row.key]), *layers]],
            all_tokens=[tokens[: edges[0]]],
            samplers=[row.sample],
            logits_processors=[[guarded(row, one) for one in row.request.processors]],
            stop_sequences=[_Stops([*ends, *row.request.stop], [token.token for token in row.answer])],
        )
        self.rows[row.uid] = row

    def step(self) -> Iterator[Ended | Kept]:
        """One pass: deliver what it gave, yield the rows that it ended, and what is worth keeping of others."""
        reading = sum(not row.answer for row in self.rows.values())
        if self.rows and not self.throughput:  # what a pass reads is bounded, however many prompts are read at once
            share = self.chunk // max(min(reading, self.way.prompts), 1)
            self.generator.prefill_step_size = max(share, min(LEAST_CHUNK, self.chunk))
        prompts, responses = self._next()
        for response in prompts:
            row = self.rows.get(response.uid)
            if row is not None and not row.answer and response.progress:
                done, total = response.progress
                row.read = row.cached + done
                row.deliver(Reading(row.read, row.cached + total))
                if row.untrimmable and response.end_of_segment and done < total:
                    layers, tokens = self._of(response.uid).extract_cache([row.uid])[row.uid]
                    yield Kept(row, list(layers[1:]), list(tokens))
        for response in responses:
            row = self.rows.get(response.uid)  # None after the end, where a pass gave more
            if row is not None and (ended := self._take(row, response)):
                yield ended

    def _next(self) -> Any:
        """A pass of the generator that has the rows, which is told how long it took."""
        self._draft()
        generator, one = self._of(next(iter(self.rows), 0)), len(self.rows) == 1
        drafted, held = getattr(generator, "drafted", 0), getattr(generator, "held", 0)
        start = time.perf_counter()
        prompts, responses = generator.next()
        if generator is self._drafting:
            self._idle = 0 if generator.drafted > drafted else self._idle + 1
            self.drafted += generator.drafted - drafted
            self.held += generator.held - held
        elif self.passes is not None and one and responses and not prompts:
            self.passes.saw(1, time.perf_counter() - start)
        return prompts, responses

    def _able(self) -> Row | None:
        """The row whose tokens may be drafted: a greedy one by itself, whose caches can take tokens back."""
        if self.passes is None or len(self.rows) != 1:
            return None
        row = next(iter(self.rows.values()))
        fits = len(row.prompt) + len(row.answer) + MOST < self._trimmable
        return row if row.answer and fits and not row.request.sampling.temperature else None

    def _draft(self) -> None:
        """Let a row that is by itself leave the batch for drafts that are worth it, or bring it back."""
        row, apart = self._able(), next((row for uid, row in self.rows.items() if uid < 0), None)
        if row is not None and row.lookup is None:
            row.lookup = Lookup(row.tokens)
            if row is apart:
                self._drafting.follow(row.lookup)
        if self.way.rows == ALONE:
            if row is None and apart is not None:  # such as a window that is full: no token can be taken back
                self._drafting.follow(None)
            return
        if apart is not None and (row is None or self._idle >= IDLE):
            self._move(apart, self.generator)
        elif apart is None and row is not None and row.lookup is not None and self.passes is not None:
            if row.lookup.draft(self.passes, row.most - len(row.answer) - 1):
                self._drafting = self._drafting or self._one_row()
                self._idle = 0
                self._move(row, self._drafting)
                self._drafting.follow(row.lookup)

    def _move(self, row: Row, generator: Any) -> None:
        """Move a row that answers to another generator, which begins at its last token."""
        kept, last = self.remove(row, keep=True), len(row.tokens) - 1
        layers, tokens = kept or (self.make_cache(self.model.model), [])
        take_back(layers, max(len(tokens) - last, 0))
        self._begin(generator, row, layers, [min(len(tokens), last), last + 1])

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
            row.answer.append(as_token(token, response.logprobs, row.request.logprobs))
            if row.lookup is not None and response.uid >= 0:  # else its generator has told it
                row.lookup.push(token)
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
            found = self._of(row.uid).remove([row.uid], return_prompt_caches=True) if keep else {}
        except Exception:  # caches of rows that have read nothing yet may have nothing to give
            found = {}
        self._of(row.uid).remove([row.uid])
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
        self._generator = self._drafting = None

    @contextmanager
    def only_own(self, keys: Sequence[Hashable | None], tokens: int) -> Iterator[None]:
        """`rows.Publish` of a lane with one adapter, which is on the model itself."""
        own = self.adapter.key if self.adapter else None
        if wrong := [key for key in keys if key != own]:
            raise AdapterError(f"a row of adapter {wrong[0]!r} is in the lane of {own!r}")
        yield


class _Stops(StopSequences):  # type: ignore[misc]
    """Stop sequences of a row that has an answer already: one may have begun in it."""

    def __init__(self, sequences: Sequence[tuple[int, ...]], answer: Sequence[int]):
        super().__init__(sequences)
        self._answer = answer

    def matcher(self) -> Any:
        matcher = super().matcher()
        for token in self._answer:
            matcher.advance(token)
        return matcher
