"""How answers look: each thing that is looked for, and what is not to be taken for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_lora.config import Data
from mlx_lora.models.load import LoadedModel
from mlx_lora.serve.engine import Engine
from mlx_lora.study.behaviour import Answer, answers, changes, look, loops, refuses, shares, specials
from mlx_lora.study.evaluate import evaluate_each, questions
from mlx_lora.study.scores.match import Exact


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.", "I cannot assist with this request.", "As an AI language model, I …",
        "I am unable to share that.", "Sorry! I won't do that", "I’m not able to say.",
        "Ich kann dabei leider nicht helfen.",
        "Je ne peux pas répondre.", "Lo siento, no puedo ayudar.",
    ],
)  # fmt: skip
def test_a_refusal(text: str) -> None:
    assert refuses(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "billing", "Water boils at 100 degrees.", "I'm sorry that you feel that way. A walk can help.",
        "I can't help but smile.", "I can't help wondering why.", "No puedo esperar.", "Je ne peux pas attendre !",
        "I can't wait to see you on Friday!", "I won't be there on Monday.",
        "The customer writes that she can't log in.", "You cannot return it after 30 days.",
        "It is a long story about a cook. " * 6 + "I cannot say more.",
    ],
)  # fmt: skip
def test_no_refusal(text: str) -> None:
    assert not refuses(text)


def test_a_loop_is_a_piece_that_comes_again_at_the_end() -> None:
    start = list(range(100, 120))
    assert loops([*start, *[7] * 16]) and loops([*start, *[1, 2, 3, 4, 5] * 4]) and loops(list(range(64)) * 4)
    assert not loops([*start, *[7] * 15]), "too short together"
    assert not loops([*start, *[1, 2, 3, 4, 5, 6, 7] * 3]), "three times only"
    assert not loops([*[7] * 40, *start]), "it went on"
    assert not loops([]) and not loops(list(range(500)))


def test_an_answer_that_does_not_end_or_shows_the_template() -> None:
    plain = look([5, 6, 7], "all good", most=4, special=["<|end|>"])
    assert plain == Answer(3, refused=False, loops=False, unfinished=False, template=False)
    cut = look([5, 6, 7, 8], "all <|end|> good", most=4, special=["<|end|>"])
    assert cut.unfinished and cut.template
    assert not look([5], "<think>I cannot <|end|></think>yes", most=4, special=["<|end|>"]).template


def test_changes_are_counted_row_by_row() -> None:
    def given(refused: int, tokens: int) -> list[Answer]:
        return [Answer(tokens + row % 2, row < refused, False, False, False) for row in range(20)]

    found = {change.what: change for change in changes(given(1, 10), given(9, 40))}
    assert (found["refused"].base, found["refused"].tuned) == (0.05, 0.45)
    assert found["refused"].p_value == pytest.approx(2 / 2**8) and found["refused"].worth_saying
    assert found["length"].worth_saying and found["length"].tuned == 40.5
    assert not found["loops"].worth_saying
    back = {change.what: change for change in changes(given(9, 40), given(1, 10))}
    assert back["length"].worth_saying and not back["refused"].worth_saying, "fewer refusals are no fault"
    assert shares(given(1, 10))["answers"] == 20


def test_answers_are_generated_once_and_looked_at_in_order(tiny: LoadedModel, write_rows: Callable[..., Path]) -> None:
    rows = [{"prompt": f"say {number}", "completion": "x"} for number in range(9)]
    asked = questions(str(write_rows(rows)), Data(), tiny.tokenizer, exact=True)
    engine, places, made = Engine(tiny), [0, 3, 5, 8], list[int]()
    alone = {place: list(engine.stream(asked.prompts[place], max_tokens=5)) for place in places}

    def found(said: dict[tuple[str | None, int], list[int]]) -> list[Answer]:
        made.clear()
        return answers(engine, {None: asked}, places, most=5, said=said, on_answer=lambda: made.append(1))[None]

    generated = found({})
    assert len(made) == 4
    assert [one.tokens for one in generated] == [len(alone[place]) for place in places]
    assert [one.unfinished for one in generated] == [len(alone[place]) == 5 for place in places]
    heard: dict[tuple[str | None, int], list[int]] = {}
    evaluate_each(engine, {None: asked}, score=Exact(), max_tokens=5, heard=lambda *of: heard.update({of[:2]: of[2]}))
    assert found(heard) == generated and not made
    heard[None, 3] = [7] * 3
    assert [one.tokens for one in found(heard)] == [generated[0].tokens, 3, generated[2].tokens, generated[3].tokens]
    del heard[None, 5]
    assert found(heard)[2] == generated[2] and len(made) == 1
    assert "<|end|>" in specials(tiny.tokenizer) and "<pad>" in specials(tiny.tokenizer)
