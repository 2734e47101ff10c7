"""How many rows of a model may share a forward pass: found by a trial at the start, for every model.

mlx_lm pads prompts of different lengths on the right and lets the caches forget the padding. A model whose state has
read the padding (nemotron_h) answers the shorter row wrongly, and some caches hold one row only. So three rows, one of
which joins late and one of which has a beginning in a cache, are run together and each by itself. The model runs in
the first way whose log-probabilities are those of the rows by themselves:

    prompts are read together, and answers are made together
    prompts are read one by one, and answers are made together
    one row at a time

Rows of different adapters share a pass where the first adapter with a module has passed a trial of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import Wrappers, put
from mlx_lora.adapters.mixed import Mixed
from mlx_lora.errors import MlxLoraError
from mlx_lora.machine import allocation

with allocation.file_limits_kept():
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.models.cache import make_prompt_cache

TOGETHER, ALONE = "together", "alone"
# Prompts that are read together at most.
PROMPTS = 8
# Largest KL divergence of a row in a batch from the row by itself: in float32, in half precision. Where reading prompts
# in other chunks, which is right too, makes a difference, so many times that is allowed, up to a limit.
TOLERANCES, TIMES, MOST = (1e-5, 5e-3), 20, 2e-2
CHUNK, WHOLE = 5, 64
# The same for rows of different adapters, and their length: with two experts a token, mlx_lm sorts two such rows.
MIXED_TOLERANCES, MIXED_TOKENS = (1e-4, 2e-2), 33


@dataclass(frozen=True)
class Way:
    """Rows run `together` or `alone`, and `prompts` are read together. `note` says why not everything is, by name."""

    rows: str = TOGETHER
    prompts: int = PROMPTS
    note: str | None = None


@dataclass(frozen=True)
class _Trial:
    """A prompt, of which a cache holds the first `cached` tokens, and the answer that is forced."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    cached: int = 0

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.answer


FIRST = (
    _Trial((5, 17, 3, 41, 8, 29, 11, 23, 2, 37, 19, 7, 31), (4, 12, 27, 9, 33, 6)),
    _Trial((9, 2, 35, 14, 6, 21), (18, 5, 40), cached=2),
)
LATE = _Trial((30, 7, 16), (25, 3, 38, 10))


def find_way(model: nn.Module, name: str) -> Way:
    """The fastest way that answers every row as by itself. `model` has no adapters; `name` is for the note."""
    expected = [_by_itself(model, trial, CHUNK) for trial in (*FIRST, LATE)]
    noise = divergence(_by_itself(model, FIRST[0], WHOLE), expected[0])
    half = any(array.dtype in (mx.float16, mx.bfloat16) for _, array in tree_flatten(model.parameters()))
    tolerance = max(TOLERANCES[half], min(TIMES * noise, MOST))
    reasons: list[str] = []
    for prompts in (PROMPTS, 1):
        if (reason := _fault(model, prompts, expected, tolerance)) is None:
            note = f"{name}: prompts are read one by one, because read together {reasons[0]}" if reasons else None
            return Way(TOGETHER, prompts, note)
        reasons.append(reason)
    return Way(ALONE, 1, f"{name}: requests are answered one by one, because in a batch {reasons[-1]}")


def _by_itself(model: nn.Module, trial: _Trial, chunk: int) -> mx.array:
    """Log-probabilities (T, V) that the answer's tokens are chosen from, the prompt read in chunks."""
    cache = make_prompt_cache(model)
    read, rest = trial.prompt[:-1], trial.tokens[len(trial.prompt) - 1 : -1]
    for start in range(0, len(read), chunk):
        model(mx.array([read[start : start + chunk]]), cache=cache)
        mx.eval([layer.state for layer in cache])
    found = [log_probabilities(model(mx.array([[token]]), cache=cache)[0, -1]) for token in rest]
    return mx.stack(found)


def log_probabilities(logits: mx.array) -> mx.array:
    """Of logits (…, V), in float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _fault(model: nn.Module, prompts: int, expected: list[mx.array], tolerance: float) -> str | None:
    """What is wrong with rows in a batch, or None."""
    try:
        found = _in_a_batch(model, prompts)
    except Exception as error:  # a model or a cache may raise anything when it is called with several rows
        return f"{type(error).__name__} is raised ({error})"
    for row, (ours, own) in enumerate(zip(found, expected, strict=True)):
        away = divergence(ours, own)
        if not away <= tolerance:
            return f"row {row + 1} of {len(found)} is off by a KL divergence of {away:.2g}"
    return None


def divergence(ours: mx.array, own: mx.array) -> float:
    """The largest KL divergence of a position, of log-probabilities (T, V) from those of the row by itself."""
    return float(mx.maximum((mx.exp(own) * (own - ours)).sum(axis=-1), 0).max().item())


def _in_a_batch(model: nn.Module, prompts: int) -> list[mx.array]:
    """Log-probabilities of each trial, in a batch that a row joins and that rows leave."""
    generator = BatchGenerator(
        model, completion_batch_size=max(4, prompts), prefill_batch_size=prompts, prefill_step_size=CHUNK,
        stream=mx.default_stream(mx.default_device()),
    )  # fmt: skip
    found: dict[int, list[mx.array]] = {}
    try:
        for trial in FIRST:
            found[_insert(generator, model, trial)] = []
        while any(len(log_probabilities) < 2 for log_probabilities in found.values()):
            _step(generator, found)
        found[_insert(generator, model, LATE)] = []
        while _step(generator, found):
            pass
    finally:
        generator.close()
    return [mx.stack(log_probabilities) for log_probabilities in found.values()]


def _insert(generator: Any, model: nn.Module, trial: _Trial) -> int:
    cache = make_prompt_cache(model)
    if trial.cached:
        model(mx.array([trial.prompt[: trial.cached]]), cache=cache)
        mx.eval([layer.state for layer in cache])
    (uid,) = generator.insert(
        [list(trial.prompt[trial.cached :])],
        max_tokens=[len(trial.answer)],
        caches=[cache],
        all_tokens=[list(trial.prompt[: trial.cached])],
        samplers=[_forced(trial.answer)],
    )
    return int(uid)


def _forced(answer: tuple[int, ...]) -> Callable[[mx.array], mx.array]:
    """A sampler that gives the tokens of an answer, and its last one for ever."""
    position = -1

    def sample(log_probabilities: mx.array) -> mx.array:
        nonlocal position
        position = min(position + 1, len(answer) - 1)
        return mx.full((log_probabilities.shape[0],), answer[position], mx.uint32)

    return sample


def _step(generator: Any, found: dict[int, list[mx.array]]) -> bool:
    """One pass; whether any row is left."""
    prompts, responses = generator.next()
    for response in responses:
        found[response.uid].append(log_probabilities(response.logprobs))
    return bool(prompts or responses)


def mixing_fault(mixed: Mixed, key: Hashable, wrappers: Wrappers, way: Way) -> str | None:
    """Why rows of adapters can't share a pass on this model, or None; tried with an adapter that `mixed` holds.

    The row of the adapter and one of the base, together, must be what each is by itself: a model may give its layers
    something else than rows. Leaves the bare model behind.
    """
    model = mixed.model
    tokens = mx.arange(2 * MIXED_TOKENS).reshape(2, -1) * 7 % 40 + 1
    keys, each = ([key, None], [wrappers, {}]) if way.rows == TOGETHER else ([key], [wrappers])
    tokens = tokens[: len(keys)]
    half = any(array.dtype in (mx.float16, mx.bfloat16) for _, array in tree_flatten(model.parameters()))
    try:
        mixed.install()
        with mixed.rows(keys, MIXED_TOKENS):
            found = log_probabilities(model(tokens))
            mx.eval(found)
        for row, own in enumerate(each):
            put(model, own)
            away = divergence(found[row], log_probabilities(model(tokens[row : row + 1]))[0])
            if not away <= MIXED_TOLERANCES[half]:
                return f"row {row + 1} of {len(keys)} is off by a KL divergence of {away:.2g}"
    except Exception as error:  # a model may do anything with its layers
        return error.message if isinstance(error, MlxLoraError) else f"{type(error).__name__} is raised ({error})"
    finally:
        put(model, {})
    return None
