"""Loss, perplexity and exact match of a base and its adapters on the same rows, with one load of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora.config import Data
from mlx_lora.data.batch import by_length
from mlx_lora.data.encode import Encoded, Encoder
from mlx_lora.data.example import Example, split_reasoning
from mlx_lora.data.fit import encode_file
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.data.read import HINT, find_splits
from mlx_lora.data.rows import Row, common
from mlx_lora.errors import DataError, Problem
from mlx_lora.models import finite
from mlx_lora.models.chat_format import ChatFormat
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.serve.engine import Engine
from mlx_lora.serve.requests import Request
from mlx_lora.train.objectives.likelihood import Loss, as_arrays

BATCH = 8
# Which file of a folder is read, in order of preference. Adapters are evaluated on test rows, since validation rows may
# have chosen between them. Quantizing and fusing measure a model on validation rows, so that test rows stay unused.
TEST_FIRST = ("test", "valid", "train")
VALID_FIRST = ("valid", "test", "train")


@dataclass(frozen=True)
class Result:
    """`loss` is the mean over tokens with loss; `exact_match` is a share of the rows, None if it wasn't computed."""

    adapter: str | None
    loss: float
    perplexity: float
    tokens: int
    rows: int
    exact_match: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Questions:
    """Rows to evaluate on: encoded, and as prompt tokens with the wanted answer.

    `last_rows[i]` is the last row of the example that prompt i comes from.
    """

    rows: Sequence[Row]
    prompts: list[list[int]]
    answers: list[str]
    last_rows: list[int] = field(default_factory=list)

    def first(self, count: int | None) -> Questions:
        """The first `count` rows and prompts; None for all."""
        chosen = self.rows[:count] if count is not None else self.rows
        return Questions(chosen, self.prompts[:count], self.answers[:count], self.last_rows[:count])


def questions(
    path: str,
    settings: Data,
    tokenizer: Any,
    *,
    exact: bool,
    format: ChatFormat | None = None,
    thinking: bool | None = None,
    prefer: tuple[str, ...] = TEST_FIRST,
    progress: OnFile = silent,
) -> Questions:
    """Read the first file of a path that `prefer` names; prompts ask to think, or not, as a chat would.

    Raises DataError listing every fault.
    """
    file = chosen_file(path, prefer)
    encoder = Encoder(tokenizer, settings, format)
    prompts: list[list[int]] = []
    answers: list[str] = []

    def ask(line: int, one: Encoded) -> None:
        if exact and one.example.text is None:
            prompts.append(encoder.prompt_tokens(one.example, thinking=thinking))
            answers.append(_answer(one.example))

    encoded = encode_file(file, encoder, progress(f"reading {file.name}", None), ask)
    problems = encoded.problems
    if exact and not problems and encoded.texts:
        problems.append(Problem(str(file), 0, "plain text has no answer to match, --exact needs prompts"))
    if not problems and not encoded.rows:
        problems.append(Problem(str(file), 0, "no row is left to evaluate"))
    if problems:
        raise DataError(problems, hint=HINT)
    ends = np.searchsorted(encoded.rows.groups, np.arange(len(prompts)), side="right") - 1
    return Questions(encoded.rows, prompts, answers, ends.tolist())


def chosen_file(path: str, prefer: tuple[str, ...] = TEST_FIRST) -> Path:
    """The file of a data path that `questions` reads. Raises DataError where there is none."""
    splits = find_splits(path)
    return next(splits[split] for split in prefer if split in splits)


def evaluate(
    engine: Engine,
    name: str | None,
    asked: Questions,
    *,
    max_tokens: int = 256,
    on_row: Callable[[], None] = lambda: None,
) -> Result:
    """Evaluate one adapter of an engine, or its base for None. `on_row` is called for each row and each answer."""
    return evaluate_each(engine, {name: asked}, max_tokens=max_tokens, on_row=on_row)[0]


def evaluate_each(
    engine: Engine,
    asked: Mapping[str | None, Questions],
    *,
    max_tokens: int = 256,
    on_row: Callable[[], None] = lambda: None,
) -> list[Result]:
    """Evaluate adapters of an engine, and its base for None, each on its own rows; `on_row` as for `evaluate`.

    Answers to all of them are made in the same batches.
    """
    losses, places = {}, {}
    for name, own in asked.items():
        engine.use(name)
        losses[name] = mean_loss(engine, own.rows, on_row)
        places[name] = first_answers(own) if engine.virtual and own.prompts else [None] * len(own.prompts)
    requests = [
        (name, number, Request(tuple(prompt), name, max_tokens, first_answer=places[name][number]))
        for name, own in asked.items()
        for number, prompt in enumerate(own.prompts)
    ]
    matches = dict.fromkeys(asked, 0)
    for index, answer in engine.together([request for *_, request in requests]):
        name, number, _ = requests[index]
        _, said = split_reasoning(engine.loaded.tokenizer.decode(answer))
        matches[name] += said.strip() == asked[name].answers[number].strip()
        on_row()
    return [
        Result(
            name, loss, math.exp(min(loss, 700)), tokens, len(asked[name].rows),
            matches[name] / len(asked[name].prompts) if asked[name].prompts else None,
        )
        for name, (loss, tokens) in losses.items()
    ]  # fmt: skip


def mean_loss(engine: Engine, rows: Sequence[Row], on_row: Callable[[], None]) -> tuple[float, int]:
    """(mean loss per token, tokens) over `rows` with the attached adapter, if any. Raises NotFinite."""
    model, virtual = engine.loaded.model, engine.virtual
    rows = [virtual.row(row) for row in rows] if virtual else rows
    loss_sum = Loss(take_apart(model))
    total, tokens = 0.0, 0
    for batch in by_length(rows, BATCH):
        loss = float(mx.array(loss_sum(as_arrays(batch))).item())
        if not math.isfinite(loss):
            raise finite.error(model, mx.array(batch.inputs))
        total += loss
        tokens += batch.trained
        for _ in batch.inputs:
            on_row()
    return total / tokens, tokens


def first_answers(asked: Questions) -> list[int | None]:
    """Where the first trained answer starts in each prompt; None if that is the answer to generate."""
    rows = [asked.rows[number] for number in asked.last_rows]
    starts = [int(np.flatnonzero(row.weights)[0]) for row in rows]
    shared = [common(row.tokens.tolist(), prompt) for row, prompt in zip(rows, asked.prompts, strict=True)]
    return [start if start <= length else None for start, length in zip(starts, shared, strict=True)]


def _answer(example: Example) -> str:
    """The text that generation should give: the answer, or "" for a turn that only calls tools."""
    if example.plain is not None:
        return example.plain[1]
    return str(example.messages[example.prompt_messages].get("content") or "")
