"""Answers as labels by likelihood: the label that the model finds most likely after the prompt.

    prompt   <|user|>Where is my parcel?<|end|><|assistant|>
    labels   delivery <|end|>      not <|end|>      not sure <|end|>

A label's log-likelihood is the sum over its tokens and the end of the turn, as training rows have them, so one label
may be the beginning of another. The prompt is read once, and all labels go on from copies of its caches. That is
compared with whole rows for each adapter's longest prompt; where it differs, all its rows are run whole.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlx_lora.data.example import split_reasoning
from mlx_lora.data.rows import Row
from mlx_lora.models.trunk.tolerance import agree
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.serve.engine import Engine
from mlx_lora.study.losses import summed
from mlx_lora.train.objectives.likelihood import negative_log_likelihood

# Positions in the copies of a prompt's caches at a time, and bytes of float32 logits.
MOST_POSITIONS, MOST_LOGITS = 4096, 64 << 20

log = logging.getLogger(__name__)


class Asked(Protocol):
    """What `evaluate.Questions` are."""

    @property
    def rows(self) -> Sequence[Row]: ...
    @property
    def prompts(self) -> list[list[int]]: ...
    @property
    def answers(self) -> list[str]: ...
    @property
    def last_rows(self) -> list[int]: ...


def likeliest(
    engine: Engine,
    asked: Asked,
    labels: Sequence[str],
    first_answers: Sequence[int | None] | None = None,
    on_row: Callable[[], None] = lambda: None,
) -> list[str] | None:
    """The likeliest label of each prompt for the adapter in use; None where `label_tokens` finds none.

    Of labels that are equally likely, the first. Further arguments as for `log_likelihoods`.
    """
    tokens = label_tokens(asked, labels, engine.loaded.tokenizer)
    if tokens is None:
        log.info("labels can't be told by likelihood, since rows hold more than a label; answers are generated")
        return None
    found = log_likelihoods(engine, asked.prompts, tokens, first_answers=first_answers, on_row=on_row)
    return [labels[place] for place in found.argmax(axis=1)]


def label_tokens(asked: Asked, labels: Sequence[str], tokenizer: Any) -> list[list[int]] | None:
    """The tokens that follow the prompt where a label is the answer, with the end of the turn, as most rows have them.

    None where rows don't hold a label and nothing else there: answers with reasoning, or cut ones.
    """
    found: dict[str, Counter[tuple[int, ...]]] = {label: Counter() for label in labels}
    for prompt, number, answer in zip(asked.prompts, asked.last_rows, asked.answers, strict=True):
        row = asked.rows[number]
        tokens = row.tokens.tolist()
        if tokens[: len(prompt)] != list(prompt):  # asked with another thinking than it was learned with
            prompt = tokens[: int(np.flatnonzero(row.weights == 0)[-1]) + 1]
        if answer.strip() in found:
            found[answer.strip()][tuple(tokens[len(prompt) :])] += 1
    chosen = {label: list(counts.most_common(1)[0][0]) for label, counts in found.items() if counts}
    ends = set(tokenizer.eos_token_ids)
    for label, tokens in chosen.items():
        text = tokenizer.decode([token for token in tokens[:-1] if token not in ends])
        if not tokens or split_reasoning(text) != (None, text) or text.strip() != label:
            return None
    return [chosen[label] for label in labels] if len(chosen) == len(labels) else None


def log_likelihoods(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[list[int]],
    *,
    first_answers: Sequence[int | None] | None = None,
    on_row: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """log p(label | prompt) with the adapter in use, float64 (prompts, labels), in nats.

    `labels` are tokens, with the end of the turn; `first_answers` as `Engine.stream` takes it. `on_row` is called for
    each prompt. Raises as `Engine.stream`.
    """
    places = first_answers or [None] * len(prompts)
    found = np.zeros((len(prompts), len(labels)))
    longest = max(range(len(prompts)), key=lambda number: len(prompts[number]))
    whole = _whole(engine, engine.complete(prompts[longest], places[longest]), labels)
    shared = _holds(engine, prompts[longest], places[longest], labels, whole)
    for number, (prompt, place) in enumerate(zip(prompts, places, strict=True)):
        if number == longest:
            found[number] = whole
        elif shared:
            found[number] = _continued(engine, prompt, place, labels)
        else:
            found[number] = _whole(engine, engine.complete(prompt, place), labels)
        on_row()
    return found


def _whole(engine: Engine, prompt: list[int], labels: Sequence[list[int]]) -> np.ndarray:
    """Each label in a row of its own, prompt and all."""
    rows = [
        Row(np.array([*prompt, *label], np.int32), np.array([0.0] * len(prompt) + [1.0] * len(label), np.float32))
        for label in labels
    ]
    return -summed(engine.loaded.model, rows)[1]


def _holds(
    engine: Engine, prompt: Sequence[int], place: int | None, labels: Sequence[list[int]], whole: np.ndarray
) -> bool:
    """Whether labels that go on from one reading of the prompt have the likelihoods that they have in whole rows."""
    try:
        found = _continued(engine, prompt, place, labels)
        if agree(
            "labels", [(mx.array(found.astype(np.float32)), mx.array(whole.astype(np.float32)))], of=engine.loaded.model
        ):
            return True
    except Exception as error:  # caches that can't be copied, or code that takes one row only
        log.debug("labels can't share a prompt: %s", error)
    log.info("labels are compared with the whole prompt each, since this model's caches can't be shared by several")
    engine.forget()
    return False


def _continued(engine: Engine, prompt: Sequence[int], place: int | None, labels: Sequence[list[int]]) -> np.ndarray:
    """All labels after one reading of the prompt, some rows of them at a time."""
    caches, last = engine.read(prompt, first_answer=place)
    width = max(map(len, labels))
    logits = 4 * width * max(take_apart(engine.loaded.model).vocabulary, 1)
    count = max(min(MOST_POSITIONS // (len(prompt) + width), MOST_LOGITS // logits), 1)
    found = []
    for start in range(0, len(labels), count):
        part = labels[start : start + count]
        inputs, targets = np.zeros((2, len(part), width), np.int32)
        weights = np.zeros((len(part), width), np.float32)
        for row, label in enumerate(part):
            inputs[row, : len(label)], targets[row, : len(label)] = [last, *label[:-1]], label
            weights[row, : len(label)] = 1
        out = engine.loaded.model(mx.array(inputs), cache=[_copies(cache, len(part)) for cache in caches])
        nll = negative_log_likelihood(out.reshape(-1, out.shape[-1]), mx.array(targets.reshape(-1)))
        found.append(-(nll.reshape(targets.shape) * mx.array(weights)).sum(axis=1))
    return np.array(mx.concatenate(found)).astype(np.float64)


def _copies(cache: Any, count: int) -> Any:
    """A cache of one row as that of `count` equal rows; what they add doesn't reach the original."""
    copied = copy.deepcopy(cache)
    copied.state = tree_map(
        lambda value: mx.repeat(value, count, axis=0) if isinstance(value, mx.array) else value, cache.state
    )
    return copied
