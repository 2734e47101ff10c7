"""Answers parted into reasoning, content and calls: the same whichever way they arrive."""

from __future__ import annotations

import random

import pytest

from mlx_lora.serve.openai.split import Splitter

THINK, CALL = ("<think>", "</think>"), ("<call>", "</call>")
Joined = list[tuple[str, str]]

# name: (think, call, opened, the answer, its parts)
CASES: dict[str, tuple[tuple[str, str] | None, tuple[str, str] | None, bool, str, Joined]] = {
    "plain": (None, None, False, "  a <think> b\n", [("content", "  a <think> b\n")]),
    "no marks": (THINK, CALL, False, " \n a < b ", [("content", " \n a < b ")]),
    "reasoning": (THINK, CALL, False, "\n<think>\n so \n</think>\n\nyes ", [("reasoning", "so"), ("content", "yes ")]),
    "opened": (THINK, None, True, "so\n</think>\n\nyes", [("reasoning", "so"), ("content", "yes")]),
    "opened twice": (THINK, None, True, "<think>so</think>yes", [("reasoning", "so"), ("content", "yes")]),
    "empty reasoning": (THINK, None, False, "<think>\n\n</think>\n\nyes", [("content", "yes")]),
    "without an end": (THINK, None, True, " so and so\n", [("reasoning", "so and so")]),
    "later reasoning is text": (THINK, None, False, "a <think>b</think>", [("content", "a <think>b</think>")]),
    "a call": (None, CALL, False, "a\n<call>x</call>\n", [("content", "a"), ("call", "x")]),
    "two calls": (None, CALL, False, "<call>x</call>\n<call>y</call>", [("call", "x"), ("call", "y")]),
    "text after a call": (None, CALL, False, "<call>x</call> b ", [("call", "x"), ("content", " b")]),
    "a call inside reasoning": (
        THINK, CALL, True, "<call>x</call></think><call>y</call>", [("reasoning", "<call>x</call>"), ("call", "y")],
    ),
    "a call without an end": (None, CALL, False, "<call>x", [("call", "x")]),
    "half a mark": (THINK, CALL, False, "a<cal", [("content", "a<cal")]),
    "up to the end": (None, ("[C]", ""), False, "a[C]x[C]y", [("content", "a"), ("call", "x[C]y")]),
    "the whole answer": (THINK, ("", ""), True, "so</think>\n{x}\n", [("reasoning", "so"), ("call", "{x}\n")]),
    "no whole answer": (None, ("", ""), False, "a {x}", [("content", "a {x}")]),
    "nothing": (THINK, CALL, False, "", []),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_answer_has_the_same_parts_in_any_pieces(name: str) -> None:
    think, call, opened, answer, expected = CASES[name]
    draw = random.Random(name)
    for round in range(30):
        size = 1 if round == 0 else len(answer) or 1 if round == 1 else 0
        splitter, parts, rest = Splitter(think, call, opened=opened), [], answer
        while rest:
            count = size or draw.randint(1, 6)
            parts += splitter.push(rest[:count])
            rest = rest[count:]
        parts += splitter.finish()
        joined: Joined = []
        for part in parts:
            if joined and joined[-1][0] == part.kind != "call":
                joined[-1] = (part.kind, joined[-1][1] + part.text)
            elif part.text:
                joined.append((part.kind, part.text))
        assert joined == expected
        assert [part.end for part in parts] == sorted(part.end for part in parts)
        assert not answer or parts[-1].end == len(answer)


def test_text_is_given_as_soon_as_it_is_certain() -> None:
    splitter = Splitter(THINK, CALL)
    assert [part.text for part in splitter.push("a b <")] == ["a b"]
    assert [part.text for part in splitter.push("c ")] == [" <c"]
