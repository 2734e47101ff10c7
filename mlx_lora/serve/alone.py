"""One row at a time, for models whose caches hold one row only: BatchGenerator's interface, without batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

Responses = tuple[list[Any], list[Any]]


@dataclass
class _Row:
    uid: int
    segments: list[list[int]]
    total: int
    most: int
    cache: list[Any]
    tokens: list[int]
    sampler: Callable[[mx.array], mx.array]
    processors: Sequence[Any]
    matcher: Any
    made: int = 0


def _progress(row: _Row, done: int, *, end: bool) -> Any:
    return SimpleNamespace(uid=row.uid, progress=(done, row.total), end_of_segment=end)


class OneRowGenerator:
    """Takes one row; `next` reads a chunk of its prompt or makes a token of its answer."""

    def __init__(self, model: Callable[..., mx.array], *, prefill_step_size: int):
        self.model, self.prefill_step_size = model, prefill_step_size
        self._row: _Row | None = None
        self._uid = 0

    def insert_segments(
        self,
        segments: list[list[list[int]]],
        max_tokens: list[int],
        caches: list[list[Any]],
        all_tokens: list[list[int]],
        samplers: list[Any],
        logits_processors: list[Sequence[Any]],
        stop_sequences: list[Any],
    ) -> list[int]:
        if self._row is not None or len(segments) != 1:
            raise ValueError("this generator takes one row at a time")
        *before, last = [list(segment) for segment in segments[0] if segment]
        parts = [*before, last[:-1], last[-1:]] if len(last) > 1 else [*before, last]
        self._uid += 1
        self._row = _Row(
            self._uid, parts, sum(map(len, parts)), max_tokens[0], caches[0], list(all_tokens[0]), samplers[0],
            logits_processors[0], stop_sequences[0].matcher(),
        )  # fmt: skip
        return [self._uid]

    def next(self) -> Responses:
        """What the pass gave: how far the prompt is, and the token if there is one."""
        row = self._row
        if row is None:
            return [], []
        if len(row.segments) > 1:
            return [self._read(row)], []
        token, log_probabilities = self._token(row)
        row.made += 1
        reason = "length" if row.made >= row.most else None
        reason = "stop" if row.matcher.advance(token) else reason
        response = SimpleNamespace(
            uid=row.uid, token=token, logprobs=log_probabilities, finish_reason=reason,
            prompt_cache=row.cache if reason else None, all_tokens=row.tokens if reason else None,
        )  # fmt: skip
        read = [_progress(row, row.total, end=True)] if row.made == 1 else []
        if reason:
            self._row = None
        return read, [response]

    def _read(self, row: _Row) -> Any:
        """Read a chunk of the prompt's first segment."""
        chunk, rest = row.segments[0][: self.prefill_step_size], row.segments[0][self.prefill_step_size :]
        self.model(mx.array([chunk]), cache=row.cache)
        mx.eval([layer.state for layer in row.cache])
        row.segments = [rest, *row.segments[1:]] if rest else row.segments[1:]
        row.tokens = row.tokens + chunk
        return _progress(row, row.total - sum(map(len, row.segments)), end=not rest)

    def _token(self, row: _Row) -> tuple[int, mx.array]:
        """The next token, and the log-probabilities (V,) that it was chosen from."""
        logits = self.model(mx.array(row.segments), cache=row.cache)[:, -1, :]
        row.tokens = row.tokens + row.segments[0]
        for processor in row.processors:
            logits = processor(mx.array(row.tokens), logits)
        log_probabilities = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        token = int(row.sampler(log_probabilities).item())
        row.segments = [[token]]
        return token, log_probabilities[0]

    def extract_cache(self, uids: list[int]) -> dict[int, Any]:
        """A copy of the row's caches, and the tokens that they hold."""
        row = self._row
        return {row.uid: (copy.deepcopy(row.cache), row.tokens)} if row is not None and row.uid in uids else {}

    def remove(self, uids: list[int], return_prompt_caches: bool = False) -> dict[int, Any]:
        row = self._row
        if row is None or row.uid not in uids:
            return {}
        self._row = None
        return {row.uid: (row.cache, row.tokens)} if return_prompt_caches else {}

    def close(self) -> None:
        self._row = None
