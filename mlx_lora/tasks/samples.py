"""A few answers beside the wanted ones, from rows as they were trained on or validated with.

A prompt is what a row's tokens have before the last part with loss, so it is what a chat would send at that turn.
Answers are greedy and short. They are for the screen, or for a file that the user names, and are kept nowhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_lora.data.example import split_reasoning
from mlx_lora.data.rows import Row, common
from mlx_lora.models.load import LoadedModel
from mlx_lora.models.trunk.trunk import Trunk
from mlx_lora.report.sample import CUT, Sample
from mlx_lora.serve.conversation import trained
from mlx_lora.serve.engine import Engine
from mlx_lora.store.adapter import StoredAdapter, read, wrappers_for

if TYPE_CHECKING:
    from mlx_lora.tasks.train import TrainedRun

COUNT, MOST_TOKENS, MOST_SECONDS = 3, 64, 20.0
# Tokens that an answer may have beyond the wanted one, so that one that doesn't end shows.
BEYOND = 16
# Rows looked at for what all prompts have in common, which isn't shown.
COMPARED = 16
# Of what is computed during training: tokens of a row, and of its answer.
LONGEST_ROW, LIKELY_TOKENS = 256, 32

OnToken = Callable[[int, int], None]


@dataclass(frozen=True)
class Asked:
    """A row as a question: prompt tokens, the wanted answer's tokens, and where the first answer in it starts."""

    prompt: list[int]
    wanted: list[int]
    first_answer: int | None


def of_run(run: TrainedRun, *, count: int = COUNT, on_token: OnToken = lambda done, total: None) -> list[Sample]:
    """Answers of the adapter that a run stored, for its first validation rows; none for rows of plain text."""
    if run.prepared.format == "text" or not run.prepared.valid:
        return []
    rows = run.prepared.valid[: max(count, COMPARED)]
    return list(answered(run.loaded, rows[:count], {run.name: read(run.path)}, beside=rows, on_token=on_token))


def answered(
    loaded: LoadedModel,
    rows: Sequence[Row],
    adapters: Mapping[str | None, StoredAdapter | None],
    *,
    beside: Sequence[Row] = (),
    on_token: OnToken = lambda done, total: None,
    seconds: float = MOST_SECONDS,
) -> Iterator[Sample]:
    """Answer `rows` by each of `adapters`, None being the base; yields a sample as its last answer ends.

    What the prompts of `rows` and of those `beside` have in common isn't shown. A row that is learned from its first
    token is left out. `on_token` hears how many tokens have been made, of how many at most. Beyond `seconds` answers
    are cut. The model has the last adapter in it afterwards.
    """
    asked = [one for row in rows if (one := question(row)) is not None]
    others = [one for row in beside if (one := question(row)) is not None]
    tokenizer, engine = loaded.tokenizer, _engine(loaded, adapters)
    shown = _shown([one.prompt for one in (*asked, *others)], tokenizer)
    most = [min(len(one.wanted) + BEYOND, MOST_TOKENS) for one in asked]
    total, done, until = sum(most) * len(adapters), 0, time.monotonic() + seconds
    for one, prompt, limit in zip(asked, shown, most, strict=False):
        answers: dict[str | None, str] = {}
        for name in adapters:
            if engine.current != name:
                engine.use(name)
            tokens: list[int] = []
            for token in engine.stream(one.prompt, max_tokens=limit, first_answer=one.first_answer):
                tokens.append(token)
                on_token(done + len(tokens), total)
                if time.monotonic() > until:
                    break
            cut = len(tokens) == limit or time.monotonic() > until
            done += limit
            answers[name] = split_reasoning(tokenizer.decode(tokens))[1].strip() + (CUT if cut else "")
        yield Sample(prompt, _text(tokenizer, one.wanted), answers)
    on_token(total, total)


def _engine(loaded: LoadedModel, adapters: Mapping[str | None, StoredAdapter | None]) -> Engine:
    """An engine with these adapters, each with its own end of an answer."""
    engine = Engine(loaded)
    for name, stored in adapters.items():
        if name is not None and stored is not None:
            end = trained(stored).format(loaded.tokenizer).own_end
            engine.add(name, wrappers_for(loaded.model, stored), end=end)
    return engine


def question(row: Row) -> Asked | None:
    """A row's last answer as a question, without virtual tokens; None where a row is learned from its first token."""
    real = row.tokens >= 0
    tokens, learned = row.tokens[real], np.flatnonzero(row.weights[real])
    if not len(learned) or learned[0] < 2:
        return None
    breaks = np.flatnonzero(np.diff(learned) > 1)
    start = int(learned[breaks[-1] + 1]) if len(breaks) else int(learned[0])
    first = int(learned[0])
    return Asked(tokens[:start].tolist(), tokens[start : learned[-1] + 1].tolist(), None if first == start else first)


def likely(trunk: Trunk, tokenizer: Any, rows: Sequence[Row], number: int) -> tuple[str | None, str | None]:
    """A row's wanted answer, and the likeliest token at each of its places, given the wanted ones before it.

    One pass over one short row, so it may be done while a run goes on; the model must be in evaluation mode. Of `rows`,
    the first short ones take turns by `number`. (None, None) where no row is short and has a prompt.
    """
    few = [row for row in rows[:COMPARED] if len(row) <= LONGEST_ROW and question(row) is not None]
    if not few:
        return None, None
    row = few[number % len(few)]
    learned = np.flatnonzero(row.weights)
    places = learned[np.append(True, np.diff(learned) > 1).nonzero()[0][-1] :][:LIKELY_TOKENS]
    hidden = trunk.run(mx.array(row.tokens[None, :-1]))[0, mx.array(places - 1)]
    tokens = mx.argmax(trunk.head(hidden), axis=-1).tolist()
    return _text(tokenizer, row.tokens[places].tolist()), _text(tokenizer, tokens)


def _shown(prompts: Sequence[list[int]], tokenizer: Any) -> list[str]:
    """Prompts without the beginning and the end that all of them share, as far as those are whole parts of a template.

    A shared part ends (or begins) at a special token or at a line's end, so questions that begin alike stay whole.
    """
    special = set(tokenizer.all_special_ids)
    first = prompts[0] if prompts else []
    begin = min((common(first, prompt) for prompt in prompts[1:]), default=0)
    end = min((common(first[::-1], prompt[::-1]) for prompt in prompts[1:]), default=0)
    while begin and first[begin - 1] not in special and not tokenizer.decode([first[begin - 1]]).endswith("\n"):
        begin -= 1
    while end and first[-end] not in special and not tokenizer.decode([first[-end]]).startswith("\n"):
        end -= 1
    return [_text(tokenizer, prompt[begin : len(prompt) - end]) for prompt in prompts]


def _text(tokenizer: Any, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
