"""Generated conversations for property tests: 1 to 6 turns, tools, reasoning and system messages or none."""

from __future__ import annotations

import json
import random
from typing import Any

from mlx_lora.data.encode import Encoder
from mlx_lora.data.example import Example, conversation

WORDS = ["river", "stone", "Anna's", '"quoted"', "naïve", "日本", "a<b", "&", "c\n", "line\ttab", "3.50", "yes", "no"]
NAMES = ("rain", "find_stone")
TOOLS = tuple({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in NAMES)


def generated(count: int, *, seed: int, tools: float = 0.3, reasoning: float = 0.4) -> list[Example]:
    """`count` conversations; `tools` and `reasoning` are the shares of those that have some."""
    draw = random.Random(seed)
    return [_one(draw, draw.random() < tools, draw.random() < reasoning) for _ in range(count)]


def _words(draw: random.Random, least: int = 1, most: int = 8) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))


def _one(draw: random.Random, tools: bool, reasoning: bool) -> Example:
    messages = [{"role": "system", "content": _words(draw)}] if draw.random() < 0.4 else []
    for _ in range(draw.randint(1, 6)):
        messages.append({"role": "user", "content": _words(draw)})
        if tools and draw.random() < 0.6:
            messages += _calls(draw, reasoning)
        messages.append(_answer(draw, reasoning))
    return conversation(messages, tools=TOOLS if tools else ())


def _calls(draw: random.Random, reasoning: bool) -> list[dict[str, Any]]:
    """An answer that calls one or two tools, and their results."""
    calls = [
        {
            "type": "function",
            "id": "call_1",
            "function": {
                "name": draw.choice(NAMES),
                "arguments": json.dumps({"town": _words(draw, 1, 2), "count": draw.randint(0, 99)}),
            },
        }
        for _ in range(draw.randint(1, 2))
    ]
    asking: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": calls}
    if reasoning and draw.random() < 0.5:
        asking["reasoning_content"] = _words(draw)
    return [asking, *({"role": "tool", "content": json.dumps({"found": _words(draw)})} for _ in calls)]


def _answer(draw: random.Random, reasoning: bool) -> dict[str, Any]:
    """An answer, with its reasoning under any of the names that it has in the wild."""
    answer = {"role": "assistant", "content": _words(draw)}
    if reasoning and draw.random() < 0.7:
        kind, thought = draw.choice(["reasoning_content", "reasoning", "inline"]), _words(draw)
        if kind == "inline":
            answer["content"] = f"<think>\n{thought}\n</think>\n\n{answer['content']}"
        else:
            answer[kind] = thought
    return answer


def learned(encoder: Encoder, examples: list[Example]) -> tuple[list[tuple[Example, int, list[int]]], list[str]]:
    """(example, index of the answer, tokens before it) for every learned answer, and the faults of the others."""
    found, faults = [], []
    for one in encoder.encoded(examples):
        if one.fault:
            faults.append(one.fault)
            continue
        starts = [
            tokens[:place]
            for tokens, weights in one.rows
            for place in range(1, len(tokens))
            if weights[place] and not weights[place - 1]
        ]
        answers = [index for index, message in enumerate(one.example.messages) if message["role"] == "assistant"]
        found += [(one.example, *pair) for pair in zip(answers, starts, strict=True)]
    return found, faults
