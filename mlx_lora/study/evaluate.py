"""Loss, exact match and scores of a base and its adapters on the same rows, with one load of the model.

Losses come row by row out of the forward passes that the mean loss is made of. Answers to all adapters are generated in
the same batches, once for everything that looks at them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
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
from mlx_lora.data.rows import Row, common, trained
from mlx_lora.errors import DataError, Problem
from mlx_lora.models import finite
from mlx_lora.models.chat_format import ChatFormat
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.serve.engine import Engine
from mlx_lora.serve.requests import Request
from mlx_lora.study.scores.base import Score
from mlx_lora.train.objectives.likelihood import Loss, as_arrays

BATCH = 8
# Which file of a folder is read, in order of preference. Adapters are evaluated on test rows, since validation rows may
# have chosen between them. Quantizing and fusing measure a model on validation rows, so that test rows stay unused.
TEST_FIRST = ("test", "valid", "train")
VALID_FIRST = ("valid", "test", "train")


@dataclass(frozen=True)
class RowResult:
    """One example: a conversation, a prompt with its answer, or a plain text.

    `number` is its row in the file, from 0 as read. `loss` is the sum of nll over its `tokens` with loss, in nats.
    `answer` is what was generated, None if nothing was asked; `score` is from 0 to 1, higher is better.
    """

    number: int
    loss: float
    tokens: int
    answer: str | None = None
    wanted: str | None = None
    score: float | None = None


@dataclass(frozen=True)
class Result:
    """`loss` is the mean over tokens with loss; `exact_match` is a share of the rows, None if it wasn't computed.

    `score` is the mean over the rows that have an answer, `details` what the score called `score_name` has to say
    beside it. `each` has a result for each row, in the order of the file; `as_dict` leaves them out.
    """

    adapter: str | None
    loss: float
    perplexity: float
    tokens: int
    rows: int
    exact_match: float | None = None
    score: float | None = None
    score_name: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    each: tuple[RowResult, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "each"}


@dataclass(frozen=True)
class Questions:
    """Rows to evaluate on: encoded, and as prompt tokens with the wanted answer.

    `last_rows[i]` is the last row of the example that prompt i comes from. `examples[j]` is the example of row j, by
    its number in the file, from 0 as read; without them each row is an example.
    """

    rows: Sequence[Row]
    prompts: list[list[int]]
    answers: list[str]
    last_rows: list[int] = field(default_factory=list)
    examples: list[int] = field(default_factory=list)

    def numbers(self) -> list[int]:
        """The example of each row."""
        return self.examples or list(range(len(self.rows)))

    def first(self, count: int | None) -> Questions:
        """The first `count` rows and prompts; None for all."""
        chosen = self.rows[:count] if count is not None else self.rows
        return Questions(
            chosen, self.prompts[:count], self.answers[:count], self.last_rows[:count], self.examples[:count]
        )


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
    found = _Found(Encoder(tokenizer, settings, format), thinking, exact, progress(f"reading {file.name}", None))
    encoded = encode_file(file, found.encoder, found.count, found.take)
    problems = encoded.problems
    if exact and not problems and encoded.texts:
        problems.append(Problem(str(file), 0, "plain text has no answer to match, --exact needs prompts"))
    if not problems and not encoded.rows:
        problems.append(Problem(str(file), 0, "no row is left to evaluate"))
    if problems:
        raise DataError(problems, hint=HINT)
    groups = encoded.rows.groups
    ends = np.searchsorted(groups, np.arange(len(found.prompts)), side="right") - 1
    numbers = np.array(found.numbers)[groups]
    return Questions(encoded.rows, found.prompts, found.answers, ends.tolist(), numbers.tolist())


@dataclass
class _Found:
    """What is kept of each example of a file: its number, and where answers are wanted its prompt and answer."""

    encoder: Encoder
    thinking: bool | None
    exact: bool
    advance: Callable[[], None]
    read: int = 0
    numbers: list[int] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)

    def count(self) -> None:
        """Count an example, also one that gives no rows."""
        self.read += 1
        self.advance()

    def take(self, line: int, one: Encoded) -> None:
        """Take the example that was counted last."""
        self.numbers.append(self.read - 1)
        if self.exact and one.example.text is None:
            self.prompts.append(self.encoder.prompt_tokens(one.example, thinking=self.thinking))
            self.answers.append(_answer(one.example))


def chosen_file(path: str, prefer: tuple[str, ...] = TEST_FIRST) -> Path:
    """The file of a data path that `questions` reads. Raises DataError where there is none."""
    splits = find_splits(path)
    return next(splits[split] for split in prefer if split in splits)


def evaluate(
    engine: Engine,
    name: str | None,
    asked: Questions,
    *,
    score: Score | None = None,
    max_tokens: int = 256,
    on_row: Callable[[], None] = lambda: None,
) -> Result:
    """Evaluate one adapter of an engine, or its base for None. `on_row` is called for each row and each answer."""
    return evaluate_each(engine, {name: asked}, score=score, max_tokens=max_tokens, on_row=on_row)[0]


def evaluate_each(
    engine: Engine,
    asked: Mapping[str | None, Questions],
    *,
    score: Score | None = None,
    max_tokens: int = 256,
    on_row: Callable[[], None] = lambda: None,
) -> list[Result]:
    """Evaluate adapters of an engine, and its base for None, each on its own rows; `on_row` as for `evaluate`.

    Exact matches are counted, and `score` is computed, where the questions have prompts.
    """
    losses = {}
    for name, own in asked.items():
        engine.use(name)
        losses[name] = row_losses(engine, own.rows, on_row)
    said = answers(engine, asked, max_tokens=max_tokens, on_row=on_row)
    return [_result(name, own, *losses[name], said[name], score) for name, own in asked.items()]


def answers(
    engine: Engine,
    asked: Mapping[str | None, Questions],
    *,
    max_tokens: int = 256,
    on_row: Callable[[], None] = lambda: None,
) -> dict[str | None, list[str]]:
    """What each adapter, and the base for None, says to each of its prompts: greedy, without reasoning, stripped.

    Answers of all of them are made in the same batches. `on_row` is called for each answer.
    """
    requests = []
    for name, own in asked.items():
        engine.use(name)
        places = first_answers(own) if engine.virtual and own.prompts else [None] * len(own.prompts)
        requests += [
            (name, number, Request(tuple(prompt), name, max_tokens, first_answer=places[number]))
            for number, prompt in enumerate(own.prompts)
        ]
    said = {name: [""] * len(own.prompts) for name, own in asked.items()}
    for index, tokens in engine.together([request for *_, request in requests]):
        name, number, _ = requests[index]
        said[name][number] = split_reasoning(engine.loaded.tokenizer.decode(tokens))[1].strip()
        on_row()
    return said


def _result(
    name: str | None, own: Questions, loss: float, sums: np.ndarray, said: list[str], score: Score | None
) -> Result:
    """The result of one adapter: mean loss, Σ nll of each row, and answers in the order of the prompts."""
    wanted = [answer.strip() for answer in own.answers[: len(said)]]
    numbers, counts = own.numbers(), trained(own.rows)
    each = {number: RowResult(number, 0.0, 0) for number in numbers}
    for number, nll, tokens in zip(numbers, sums.tolist(), counts.tolist(), strict=True):
        each[number] = replace(each[number], loss=each[number].loss + nll, tokens=each[number].tokens + tokens)
    scores = [score.of(right, answer) for right, answer in zip(wanted, said, strict=True)] if score else []
    for place, (right, answer) in enumerate(zip(wanted, said, strict=True)):
        number = numbers[own.last_rows[place]]
        each[number] = replace(each[number], answer=answer, wanted=right, score=scores[place] if score else None)
    matches = sum(right == answer for right, answer in zip(wanted, said, strict=True))
    return Result(
        name, loss, math.exp(min(loss, 700)), int(counts.sum()), len(own.rows),
        matches / len(said) if said else None,
        sum(scores) / len(scores) if scores else None,
        score.name if score and scores else None,
        score.details(wanted, said) if score and scores else {},
        tuple(each[number] for number in sorted(each)),
    )  # fmt: skip


def row_losses(engine: Engine, rows: Sequence[Row], on_row: Callable[[], None]) -> tuple[float, np.ndarray]:
    """(mean loss per token, Σ nll of each row (rows,) float64), with the attached adapter, if any. Raises NotFinite."""
    model, virtual = engine.loaded.model, engine.virtual
    rows = [virtual.row(row) for row in rows] if virtual else rows
    loss_sum = Loss(take_apart(model))
    total, tokens, sums = 0.0, 0, np.zeros(len(rows))
    for batch in by_length(rows, BATCH):
        arrays = as_arrays(batch)
        loss, each = loss_sum.with_each(arrays)
        mx.eval(loss, each)
        if not math.isfinite(float(loss.item())):
            raise finite.error(model, mx.array(batch.inputs))
        total += float(loss.item())
        tokens += batch.trained
        lines = np.array(arrays["positions"]) // batch.inputs.shape[1]
        sums[[row for (row,) in batch.lines]] = np.bincount(lines, np.array(each), len(batch.lines))
        for _ in batch.inputs:
            on_row()
    return total / tokens, sums


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
