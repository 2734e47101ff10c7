"""Loss, exact match and scores of a base and its adapters on the same rows, with one load of the model.

Losses come row by row out of the forward passes of the mean loss. All adapters' answers are made in the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from mlx_lora.config import Data
from mlx_lora.data.encode import Encoded, Encoder
from mlx_lora.data.example import Example, split_reasoning
from mlx_lora.data.fit import encode_file
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.data.read import HINT
from mlx_lora.data.rows import Row, common, trained
from mlx_lora.data.splits import TEST_FIRST, chosen_file
from mlx_lora.errors import DataError, Problem
from mlx_lora.models.chat_format import ChatFormat
from mlx_lora.serve.engine import Engine
from mlx_lora.serve.requests import Request
from mlx_lora.study.labels import likeliest
from mlx_lora.study.losses import row_losses
from mlx_lora.study.scores.base import Score
from mlx_lora.study.scores.labels import Accuracy, answered, applied

# Hears who answered (None: the base), the number of the prompt, and the answer's tokens.
Heard = Callable[[str | None, int, list[int]], None]


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
        """The first `count` rows, and the prompts of examples that have all their rows among them; None for all."""
        if count is None:
            return self
        prompts = sum(last < count for last in self.last_rows) if self.last_rows else count
        return Questions(
            self.rows[:count], self.prompts[:prompts], self.answers[:prompts], self.last_rows[:prompts],
            self.examples[:count],
        )  # fmt: skip


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
        problems.append(
            Problem(str(file), 0, "plain text has no answer to compare with: --exact and --score need prompts")
        )
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
    more: Sequence[Score] = (),
    exact: bool | None = None,
    max_tokens: int = 256,
    on_row: Callable[[], None] = lambda: None,
    heard: Heard = lambda name, number, tokens: None,
) -> list[Result]:
    """Evaluate adapters of an engine, and its base for None, each on its own rows; `on_row` as for `evaluate`.

    `heard` is told the tokens of each generated answer.

    Questions that have prompts are answered: by the likeliest label for accuracy, by generation for everything else.
    `more` scores are computed beside `score`, in `details["more"]`. Exact matches are counted where `exact` is true, or
    is None and answers are generated anyway.
    """
    scores = [*([score] if score else []), *more]
    labels = next((one.labels for one in scores if isinstance(one, Accuracy)), None)
    losses, likely = dict[str | None, tuple[float, np.ndarray]](), dict[str | None, list[str] | None]()
    for name, own in asked.items():
        engine.use(name)
        losses[name] = row_losses(engine, own.rows, on_row)
        places = first_answers(own) if engine.virtual and own.prompts else None
        likely[name] = likeliest(engine, own, labels, places, on_row) if labels and own.prompts else None
    generated = answered(scores, bool(exact)) > bool(labels) or None in likely.values()
    said = answers(engine, asked, max_tokens=max_tokens, on_row=on_row, heard=heard) if generated else {}
    results = []
    for name, own in asked.items():
        result = _losses(name, own, *losses[name])
        if said and exact is not False and own.prompts:
            pairs = zip(own.answers, said[name], strict=True)
            result = replace(result, exact_match=sum(a.strip() == b for a, b in pairs) / len(own.prompts))
        results.append(_scored(result, own, scores, said.get(name), likely[name]))
    return results


def answers(
    engine: Engine,
    asked: Mapping[str | None, Questions],
    *,
    max_tokens: int = 256,
    on_row: Callable[[], None] = lambda: None,
    heard: Heard = lambda name, number, tokens: None,
) -> dict[str | None, list[str]]:
    """What each adapter, and the base for None, says to each of its prompts: greedy, without reasoning, stripped.

    Answers of all of them are made in the same batches. `on_row` is called for each answer.
    """
    said = {name: [""] * len(own.prompts) for name, own in asked.items()}
    for name, number, tokens in generated(engine, asked, max_tokens=max_tokens):
        heard(name, number, tokens)
        said[name][number] = split_reasoning(engine.loaded.tokenizer.decode(tokens))[1].strip()
        on_row()
    return said


def generated(
    engine: Engine, asked: Mapping[str | None, Questions], *, max_tokens: int
) -> Iterator[tuple[str | None, int, list[int]]]:
    """(adapter or None, number of its prompt, tokens of the greedy answer), as answers end, in common batches."""
    requests = []
    for name, own in asked.items():
        engine.use(name)
        places = first_answers(own) if engine.virtual and own.prompts else [None] * len(own.prompts)
        requests += [
            (name, number, Request(tuple(prompt), name, max_tokens, first_answer=places[number]))
            for number, prompt in enumerate(own.prompts)
        ]
    for index, tokens in engine.together([request for *_, request in requests]):
        yield (*requests[index][:2], tokens)


def _losses(name: str | None, own: Questions, loss: float, sums: np.ndarray) -> Result:
    """The result of one adapter without answers: mean loss, and Σ nll of each row to sum for each example."""
    numbers, counts = own.numbers(), trained(own.rows)
    each = {number: RowResult(number, 0.0, 0) for number in numbers}
    for number, nll, tokens in zip(numbers, sums.tolist(), counts.tolist(), strict=True):
        each[number] = replace(each[number], loss=each[number].loss + nll, tokens=each[number].tokens + tokens)
    ordered = tuple(each[number] for number in sorted(each))
    return Result(name, loss, math.exp(min(loss, 700)), int(counts.sum()), len(own.rows), each=ordered)


def _scored(
    result: Result, own: Questions, scores: Sequence[Score], said: list[str] | None, likely: list[str] | None
) -> Result:
    """A result with its answers and their scores. The rows have those of the first score."""
    if not own.prompts or (said is None and likely is None):
        return result
    wanted = [answer.strip() for answer in own.answers]
    found = [applied(score, wanted, said, likely) for score in scores]
    numbers = own.numbers()
    each = {row.number: row for row in result.each}
    for place, last in enumerate(own.last_rows):
        answer = found[0].answers[place] if found else (said or [])[place]
        value = found[0].values[place] if found else None
        number = numbers[last]
        each[number] = replace(each[number], answer=answer, wanted=wanted[place], score=value)
    result = replace(result, each=tuple(each.values()))
    if not found:
        return result
    first, *others = found
    more = {score.name: {"score": one.mean, **one.details} for score, one in zip(scores[1:], others, strict=True)}
    details = {**first.details, "more": more} if more else first.details
    return replace(result, score=first.mean, score_name=scores[0].name, details=details)


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
