"""How answers look, whatever they say: their length, refusals, repetition, and whether the chat format is kept.

An adapter that is right on its task may still have lost this: it goes on after the answer, repeats itself, writes the
template's own tokens into the text, or refuses. Each answer is looked at by itself; base and adapter get the same
prompts, and their shares are compared row by row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from mlx_lora.data.example import split_reasoning
from mlx_lora.serve.engine import Engine
from mlx_lora.study.evaluate import Questions, generated
from mlx_lora.study.statistics import mcnemar, sign_flip

# Words with which assistants refuse, near the beginning of an answer: not "I can't wait", nor "I won't be there".
REFUSAL = re.compile(
    r"\b(i|we)( am|'m)? (can ?not|can't|could not|won't|will not|unable to|not able to|not allowed to)\b.{0,20}"
    r"\b(help(?! but\b| \w+ing\b)|assist|do|answer|provide|share|comply|fulfil\w*|create|write|generate|discuss|give"
    r"|support|say|tell|engage|continue|offer|recommend|accept|perform|complete|respond|access)\b"
    r"|\b(i'm|i am) (sorry|afraid),? (but|i can|i'm|that i can)|\bas an ai\b|\bi must decline\b"
    r"|\b(ich|wir) (kann|können|darf|dürfen)\b.{0,25}\b(nicht|keine)\b|\bje ne (peux|puis) pas\b(?! attendre)"
    r"|\bno puedo\b(?! esperar)",
    re.IGNORECASE,
)
REFUSAL_WITHIN = 120
# An answer loops if it ends with a piece of at most so many tokens, so often, over at least so many tokens together.
PERIOD, TIMES, TOKENS = 64, 4, 16
# A change is one that is worth saying: of a share of the answers by this much, of a length by this factor, and at 5 %.
SHARE, LONGER, CHANCE = 0.1, 1.5, 0.05
# What counts against an answer: its name in a table, and the words for more of it.
FAULTS = {
    "refused": ("refusals", "refuses more often"),
    "loops": ("repetition", "repeats itself more often"),
    "unfinished": ("not ended", "doesn't end its answers"),
    "template": ("template tokens", "writes the chat template's tokens into its answers"),
}


@dataclass(frozen=True)
class Answer:
    """What there is to see of one answer. `unfinished`: no end token came within the tokens allowed."""

    tokens: int
    refused: bool
    loops: bool
    unfinished: bool
    template: bool


@dataclass(frozen=True)
class Change:
    """How often answers to the same prompts had a fault, `base` and `tuned` as shares; of "length" the mean tokens."""

    what: str
    base: float
    tuned: float
    p_value: float

    @property
    def worth_saying(self) -> bool:
        if self.what == "length":
            factor = (self.tuned + 1) / (self.base + 1)
            return self.p_value < CHANCE and not 1 / LONGER < factor < LONGER
        return self.p_value < CHANCE and self.tuned - self.base >= SHARE


@dataclass(frozen=True)
class Looked:
    """Answers to the same prompts by both sides."""

    base: list[Answer]
    tuned: list[Answer]

    @property
    def changes(self) -> list[Change]:
        return changes(self.base, self.tuned) if self.base else []

    def as_dict(self) -> dict[str, dict[str, float]]:
        return {"base": shares(self.base), "tuned": shares(self.tuned)}


def look(tokens: list[int], text: str, *, most: int, special: Sequence[str]) -> Answer:
    """An answer of at most `most` `tokens`, without its end token, and its `text`, in which `special` aren't hidden."""
    said = split_reasoning(text)[1]
    return Answer(
        tokens=len(tokens),
        refused=refuses(said),
        loops=loops(tokens),
        unfinished=len(tokens) >= most,
        template=any(token in said for token in special),
    )


def refuses(text: str) -> bool:
    """Whether an answer begins by refusing, in the words that assistants have for it (English, German, French and
    Spanish). "I can't" anywhere later in a text is no refusal."""
    return REFUSAL.search(text.strip()[:REFUSAL_WITHIN].replace("’", "'")) is not None


def loops(tokens: list[int]) -> bool:
    """Whether an answer ends in one piece of 1 to 64 tokens at least four times over, 16 tokens or more in all."""
    count = len(tokens)
    for period in range(1, min(PERIOD, count // TIMES) + 1):
        needed = max(TIMES * period, TOKENS)
        end = tokens[-needed:]
        if needed <= count and end[period:] == end[:-period]:
            return True
    return False


def answers(
    engine: Engine,
    asked: Mapping[str | None, Questions],
    places: Sequence[int],
    *,
    most: int,
    said: Mapping[tuple[str | None, int], list[int]],
    on_answer: Callable[[], None] = lambda: None,
) -> dict[str | None, list[Answer]]:
    """Greedy answers of the base (None) and of adapters to some of their prompts, at most `most` tokens each.

    Those in `said`, by who answered and the prompt's number, are looked at as they are; others are generated, in common
    batches. Each side's answers are in the order of `places`.
    """
    tokenizer, tokens = engine.loaded.tokenizer, dict(said)
    special = specials(tokenizer)
    missing = {name: [place for place in places if (name, place) not in said] for name in asked}
    left = {name: _some(own, missing[name]) for name, own in asked.items() if missing[name]}
    for name, number, answer in generated(engine, left, max_tokens=most):
        tokens[name, missing[name][number]] = answer
        on_answer()

    def seen(answer: list[int]) -> Answer:
        return look(answer, tokenizer.decode(answer), most=most, special=special)

    return {name: [seen(tokens[name, place]) for place in places] for name in asked}


def _some(asked: Questions, places: Sequence[int]) -> Questions:
    """The prompts at some places, with all rows."""
    return replace(
        asked,
        prompts=[asked.prompts[place] for place in places],
        answers=[asked.answers[place] for place in places],
        last_rows=[asked.last_rows[place] for place in places],
    )


def specials(tokenizer: Any) -> list[str]:
    """The tokenizer's special tokens as text; those of one or two characters could be an answer's own."""
    return [token for token in map(str, tokenizer.all_special_tokens) if len(token) > 2]


def shares(given: Sequence[Answer]) -> dict[str, float]:
    """Mean length in tokens and the share of each fault, over at least one answer."""
    means = {field.name: float(np.mean([getattr(one, field.name) for one in given])) for field in fields(Answer)}
    return {"answers": len(given), **means}


def changes(base: Sequence[Answer], tuned: Sequence[Answer]) -> list[Change]:
    """What differs between two sides' answers to the same prompts; McNemar for shares, sign flips for the length."""
    before, after = shares(base), shares(tuned)
    lengths = np.array([other.tokens - one.tokens for one, other in zip(base, tuned, strict=True)], float)
    found = [Change("length", before["tokens"], after["tokens"], sign_flip(lengths))]
    for fault in FAULTS:
        pairs = [(getattr(one, fault), getattr(other, fault)) for one, other in zip(base, tuned, strict=True)]
        p_value = mcnemar(pairs.count((False, True)), pairs.count((True, False)))
        found.append(Change(fault, before[fault], after[fault], p_value))
    return found
