"""One row at a time: BatchGenerator's interface, without batches.

For models whose caches hold one row only, and for a greedy row by itself whose tokens are drafted (`serve.lookup`).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

from mlx_lora.serve.lookup import SUREST, Lookup, Passes, take_back

Responses = tuple[list[Any], list[Any]]


# The next token of a row and the log-probabilities (1, V) that it is chosen from, not evaluated yet.
_Next = tuple[mx.array, mx.array]


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
    lookup: Lookup | None = None
    ahead: _Next | None = None


def _progress(row: _Row, done: int, *, end: bool) -> Any:
    return SimpleNamespace(uid=row.uid, progress=(done, row.total), end_of_segment=end)


class OneRowGenerator:
    """Takes one row; `next` reads a chunk of its prompt, or makes a token of its answer and those that were drafted.

    Without drafts a pass begins before the token before it has been read, so that the device doesn't wait for Python.
    `passes` says whether drafts are worth it, None without lookup. `drafted` tokens were verified, and `held` of them
    were right. Ids of rows are negative, so that they are never those of a BatchGenerator.
    """

    def __init__(self, model: Callable[..., mx.array], *, prefill_step_size: int, passes: Passes | None = None):
        self.model, self.prefill_step_size, self.passes = model, prefill_step_size, passes
        self.drafted = self.held = 0
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
        self._uid -= 1
        self._row = _Row(
            self._uid, parts, sum(map(len, parts)), max_tokens[0], caches[0], list(all_tokens[0]), samplers[0],
            logits_processors[0], stop_sequences[0].matcher(),
        )  # fmt: skip
        return [self._uid]

    def follow(self, lookup: Lookup | None) -> None:
        """Draft the row's tokens out of `lookup`, which is told every token from now on; None drafts nothing."""
        if self._row is not None:
            self._row.lookup = lookup

    def next(self) -> Responses:
        """What the pass gave: how far the prompt is, and the tokens if there are any."""
        row = self._row
        if row is None:
            return [], []
        if len(row.segments) > 1:
            return [self._read(row)], []
        read = [_progress(row, row.total, end=True)] if not row.made else []
        start = time.perf_counter()
        ahead = row.ahead is not None
        draft = [] if ahead else self._draft(row)
        made = self._verified(row, draft) if draft else [self._token(row)]
        # a single token behind a draft waits for its whole pass, which it doesn't where no drafts are made
        if self.passes is not None and (draft or ahead) and not read and not row.processors:
            self.passes.saw(1 + len(draft), time.perf_counter() - start)
        if self.passes is not None and row.lookup is not None and draft:
            self.passes.kept_of(min(row.lookup.rate, SUREST), len(draft), len(made))
        return read, self._answer(row, draft, made)

    def _draft(self, row: _Row) -> list[int]:
        if row.lookup is None or self.passes is None or not row.made:
            return []
        return row.lookup.draft(self.passes, row.most - row.made - 1)

    def _answer(self, row: _Row, draft: list[int], made: list[tuple[int, mx.array]]) -> list[Any]:
        """The tokens that a pass gave, up to the end of the answer; what the caches hold beyond it is taken back."""
        responses = list[Any]()
        for token, log_probabilities in made:
            row.made += 1
            reason = "length" if row.made >= row.most else None
            reason = "stop" if row.matcher.advance(token) else reason
            responses.append(SimpleNamespace(
                uid=row.uid, token=token, logprobs=log_probabilities, finish_reason=reason, prompt_cache=None,
                all_tokens=None,
            ))  # fmt: skip
            if row.lookup is not None:
                row.lookup.push(token)
            if reason:
                break
        take_back(row.cache, len(draft) + 1 - len(responses))
        row.tokens += [*row.segments[0], *(response.token for response in responses[:-1])]
        row.segments = [[responses[-1].token]]
        if row.ahead is not None:  # a pass over the last token has begun
            row.tokens, row.segments = row.tokens + row.segments[0], [[]]
        self.drafted += len(draft)
        self.held += len(responses) - 1
        if responses[-1].finish_reason:
            responses[-1].prompt_cache, responses[-1].all_tokens, self._row = row.cache, row.tokens, None
        return responses

    def _read(self, row: _Row) -> Any:
        """Read a chunk of the prompt's first segment."""
        chunk, rest = row.segments[0][: self.prefill_step_size], row.segments[0][self.prefill_step_size :]
        self.model(mx.array([chunk]), cache=row.cache)
        mx.eval([layer.state for layer in row.cache])
        row.segments = [rest, *row.segments[1:]] if rest else row.segments[1:]
        row.tokens += chunk
        return _progress(row, row.total - sum(map(len, row.segments)), end=not rest)

    def _token(self, row: _Row) -> tuple[int, mx.array]:
        """The next token, and the log-probabilities (V,) that it was chosen from."""
        token, log_probabilities = row.ahead or self._pass(row, mx.array(row.segments))
        row.ahead = None
        if not row.processors and row.made + 1 < row.most and not self._draft(row):
            row.ahead = self._pass(row, token[:, None])
            mx.async_eval(row.ahead)
        return int(token.item()), log_probabilities[0]

    def _pass(self, row: _Row, tokens: mx.array) -> _Next:
        """What comes behind `tokens` (1, T)."""
        logits = self.model(tokens, cache=row.cache)[:, -1, :]
        for processor in row.processors:
            logits = processor(mx.array(row.tokens + row.segments[0]), logits)
        log_probabilities = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return row.sampler(log_probabilities), log_probabilities

    def _verified(self, row: _Row, draft: list[int]) -> list[tuple[int, mx.array]]:
        """The tokens behind the last one while the draft holds, with the log-probabilities (V,) they were chosen from.

        A processor sees what it would see without a draft: tokens that hold, one after another.
        """
        given = row.segments[0]
        logits = self.model(mx.array([[*given, *draft]]), cache=row.cache)[0]
        made: list[tuple[int, mx.array]] = []
        if not row.processors:
            log_probabilities = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            chosen: list[int] = row.sampler(log_probabilities).tolist()  # type: ignore[assignment]
            right = next((i for i, token in enumerate(draft) if chosen[i] != token), len(draft))
            return [(int(chosen[i]), log_probabilities[i]) for i in range(right + 1)]
        for place in range(len(draft) + 1):
            one, context = logits[place : place + 1], mx.array([*row.tokens, *given, *draft[:place]])
            for processor in row.processors:
                one = processor(context, one)
            log_probabilities = one - mx.logsumexp(one, axis=-1, keepdims=True)
            made.append((int(row.sampler(log_probabilities).item()), log_probabilities[0]))
            if place < len(draft) and made[-1][0] != draft[place]:
                break
        return made

    def extract_cache(self, uids: list[int]) -> dict[int, Any]:
        """A copy of the row's caches, and the tokens that they hold."""
        row = self._row
        return {row.uid: (copy.deepcopy(row.cache), list(row.tokens))} if row is not None and row.uid in uids else {}

    def remove(self, uids: list[int], return_prompt_caches: bool = False) -> dict[int, Any]:
        row = self._row
        if row is None or row.uid not in uids:
            return {}
        self._row = None
        return {row.uid: (row.cache, row.tokens)} if return_prompt_caches else {}

    def close(self) -> None:
        self._row = None
