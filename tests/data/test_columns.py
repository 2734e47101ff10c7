"""What columns mean: known names, what `data.columns` says, and one error for a file whose columns can't be told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mlx_lora.config import Data
from mlx_lora.data.columns import PAIRS, find
from mlx_lora.data.example import Example
from mlx_lora.data.read import Source, read
from mlx_lora.recipe import load_recipe
from tests.data.conftest import TALK, message

TURNS = [message("user", "q"), message("assistant", "a")]
FROM = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., Source]:
    def make(*rows: Any, **settings: Any) -> Source:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read(file, Data(**settings))

    return make


def exchange(example: Example) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in example.messages]


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
@pytest.mark.parametrize("spelt", [str, str.upper, lambda name: f" {name[0]}_{name[1:]} "], ids=["as-is", "upper", "_"])
def test_known_pairs_are_a_question_and_its_answer(
    source: Callable[..., Source], prompt: str, completion: str, spelt: Callable[[str], str]
) -> None:
    found = source({"id": "1", spelt(prompt): "q", spelt(completion): "a"})
    assert found.problems == []
    assert exchange(found.examples[0]) == [("user", "q"), ("assistant", "a")]
    assert found.columns == {"prompt": spelt(prompt), "completion": spelt(completion)}


@pytest.mark.parametrize(
    ("row", "columns", "said"),
    [
        ({"instruction": "i", "context": "c", "response": "r"},
         {"prompt": "instruction", "input": "context", "completion": "response"}, "i\n\nc"),
        ({"instruction": "i", "input": "c", "output": "r"},
         {"prompt": "instruction", "input": "input", "completion": "output"}, "i\n\nc"),
        ({"question": "i", "context": "c", "answer": "r"},
         {"prompt": "question", "input": "context", "completion": "answer"}, "i\n\nc"),
        ({"instruction": "i", "input": "", "output": "r"},
         {"prompt": "instruction", "input": "input", "completion": "output"}, "i"),
        ({"Instruction": "i", "Input": None, "Output": "r"},
         {"prompt": "Instruction", "input": "Input", "completion": "Output"}, "i"),
        ({"text": "i", "label": "r"}, {"prompt": "text", "completion": "label"}, "i"),
    ],
)  # fmt: skip
def test_what_a_prompt_is_about_follows_it(
    source: Callable[..., Source], row: dict[str, str], columns: dict[str, str], said: str
) -> None:
    found = source(row)
    assert (found.problems, found.columns) == ([], columns)
    assert exchange(found.examples[0]) == [("user", said), ("assistant", "r")]


@pytest.mark.parametrize("answer", [7, 0.5, True])
def test_numbers_as_labels_become_their_text(source: Callable[..., Source], answer: Any) -> None:
    found = source({"text": "t", "label": answer}, {"text": "t", "label": "word"})
    assert [example.messages[1]["content"] for example in found.examples] == [json.dumps(answer), "word"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"Messages": json.dumps(TURNS)},
        {"messages": str(TURNS)},
        {"messages": FROM},
        {"conversations": FROM},
        {"conversations": TURNS},
        {"conversation": json.dumps(FROM)},
        {"prompt": "not this", "messages": TURNS, "text": "nor this"},
    ],
)
def test_conversations_in_a_column(source: Callable[..., Source], row: dict[str, Any]) -> None:
    found = source(row)
    assert found.problems == []
    assert exchange(found.examples[0]) == [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    "row",
    [
        {"system_prompt": "s", "question": "q", "answer": "a"},
        {"System": "s", "prompt": "q", "completion": "a"},
        {"system": "s", "prompt": TURNS[:1], "completion": TURNS[1:]},
        {"system": "s", "instruction": "q", "output": "a"},
        {"system prompt": "s", "messages": TURNS},
        {"system": "s", "conversations": FROM},
        {"messages": [message("system", "s"), *TURNS], "system": "another"},
    ],
)
def test_system_prompts_in_a_column(source: Callable[..., Source], row: dict[str, Any]) -> None:
    (example,) = source(row, system="not for this one").examples
    assert exchange(example) == [("system", "s"), ("user", "q"), ("assistant", "a")]
    assert example.prompt_messages == 2


def test_data_system_goes_before_every_row_that_has_none(source: Callable[..., Source]) -> None:
    rows = [{"prompt": "q", "completion": "a", "system": system} for system in ("own", "", None)]
    examples = source(*rows, system="s").examples
    assert [example.messages[0]["content"] for example in examples] == ["own", "s", "s"]
    assert [example.plain for example in examples] == [("own\n\nq", "a"), ("s\n\nq", "a"), ("s\n\nq", "a")]
    assert source({"text": "t"}, system="s").examples == [Example(text="t", mask="all")]


@pytest.mark.parametrize(
    ("chosen", "row", "expected"),
    [
        ({"prompt": "title", "completion": "body"}, {"title": "q", "body": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"prompt": "{title}\n({ year })", "completion": "body"}, {"title": "q", " year ": 5, "body": "a"},
         [("user", "q\n(5)"), ("assistant", "a")]),
        ({"prompt": "{{{title}}}", "completion": "body"}, {"title": "q", "body": "a"},
         [("user", "{q}"), ("assistant", "a")]),
        ({"prompt": "{odd}", "completion": "body"}, {"{odd}": "q", "body": 1}, [("user", "q"), ("assistant", "1")]),
        ({"prompt": "title", "completion": "body", "system": "Write of {topic}."},
         {"title": "q", "body": "a", "topic": "t"}, [("system", "Write of t."), ("user", "q"), ("assistant", "a")]),
        ({"messages": "talk"}, {"talk": json.dumps(FROM), "text": "t"}, [("user", "q"), ("assistant", "a")]),
        ({"prompt": "question", "completion": "answer"}, {"question": "q", "context": "c", "answer": "a"},
         [("user", "q"), ("assistant", "a")]),
        ({"system": "persona"}, {"prompt": "q", "completion": "a", "persona": "p"},
         [("system", "p"), ("user", "q"), ("assistant", "a")]),
        ({"prompt": "prompt", "completion": "response"}, {"prompt": "q", "response": "a", "completion": "b"},
         [("user", "q"), ("assistant", "a")]),
    ],
)  # fmt: skip
def test_columns_by_name_and_by_template(
    source: Callable[..., Source], chosen: dict[str, str], row: Any, expected: Any
) -> None:
    found = source(row, columns=chosen)
    assert found.problems == []
    assert exchange(found.examples[0]) == expected
    assert found.columns.items() >= chosen.items()


@pytest.mark.parametrize(
    ("format", "role"), [("auto", "messages"), ("completions", "prompt"), ("alpaca", "input"), ("text", "text")]
)
def test_a_format_that_is_asked_for_is_taken(source: Callable[..., Source], format: str, role: str) -> None:
    row = {"messages": TURNS, "prompt": "q", "completion": "a", "instruction": "q", "input": "x", "output": "a"}
    found = source(row | {"text": "t"}, format=format)
    assert found.problems == [] and len(found.examples) == 1
    assert role in found.columns


def test_text_by_template(source: Callable[..., Source]) -> None:
    found = source({"title": "t", "body": None}, columns={"text": "# {title}\n{body}"})
    assert [example.text for example in found.examples] == ["# t\n"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"title": "a", "body": "b"}, ["'title', 'body'", "question/answer", "messages",
                                       "'data.columns={prompt: title, completion: body}'"]),
        ({"note": "a"}, ["'note'", "'data.columns={text: note}'"]),
        ({"a: b": "a", "no": "b"}, ["""'data.columns={prompt: "a: b", completion: "no"}'"""]),
        ({"question": "a", "answer": "b", "prompt": "c", "completion": "d"},
         ["question/answer", "prompt/completion", "choose one", "{prompt: question, completion: answer}"]),
        ({"prompt": "a", "completion": "b", "response": "c"}, ["prompt/completion and prompt/response"]),
    ],
)  # fmt: skip
def test_what_cant_be_told_is_one_error_with_the_choices(
    source: Callable[..., Source], row: dict[str, str], said: list[str]
) -> None:
    found = source(row, row, row)
    assert found.examples == []
    (problem,) = found.problems
    assert problem.line == 1
    for part in said:
        assert part in problem.problem
    override = re.search(r"'(data\.columns=\{.*?\})'", problem.problem)
    assert override is not None
    chosen = load_recipe(overrides=["model=m", override.group(1)]).data
    assert find(row, chosen).roles == chosen.columns, "the override that is shown works"


@pytest.mark.parametrize(
    ("row", "settings", "problem"),
    [
        ({"title": "a"}, {"columns": {"text": "tilte"}}, "no column is named 'tilte'; did you mean 'title'?"),
        ({"title": "a"}, {"columns": {"text": "{tilte}!"}}, "no column is named 'tilte'; did you mean 'title'?"),
        ({"title": "a"}, {"columns": {"text": "{title} {"}}, "has a single brace"),
        ({"text": "a"}, {"columns": {"text": "text"}, "format": "messages"}, "data.format is messages"),
        ({"question": " ", "answer": "b"}, {}, "'question' is empty"),
        ({"question": "a", "answer": None}, {}, "'answer' is empty"),
        ({"question": "a", "answer": ["b"]}, {}, "'answer' is list, not a string"),
        ({"talk": "once upon"}, {"columns": {"messages": "talk"}}, "'talk' is text, and not a JSON list"),
        ({"title": " ", "body": ""}, {"columns": {"text": "{title}: {body}"}}, "'title', 'body' is empty"),
        ({"title": ["a"]}, {"columns": {"text": "{title}"}}, "'title' is list, not a string"),
    ],
)
def test_problems_name_the_column(
    source: Callable[..., Source], row: dict[str, Any], settings: dict[str, Any], problem: str
) -> None:
    found = source(row, **settings)
    assert found.examples == []
    assert [problem in each.problem for each in found.problems] == [True]


def test_a_row_that_lacks_a_column_is_a_problem_of_that_row(source: Callable[..., Source]) -> None:
    rows = [{"Q": "a", "A": "b"}, {"Q": "a"}, {"A": "b", "extra": 1, "Q": "a"}]
    found = source(*rows, columns={"prompt": "Q", "completion": "A"})
    assert found.lines == [1, 3]
    assert [(problem.line, problem.problem) for problem in found.problems] == [
        (2, "not a row of format completions: its keys are 'Q'")
    ]


def test_names_that_may_be_data_are_cut(source: Callable[..., Source]) -> None:
    (problem,) = source({"S" * 500: 1, "T" * 30: 2}).problems
    assert max(len(run) for run in re.findall("S+|T+", problem.problem)) <= 40


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"promt": "a", "completion": "b"}, "did you mean 'prompt'"),
        ({"prompt": "a"}, "a row is made of prompt and completion"),
        ({"text": "a", "prompt": "b", "completion": "c"}, "a row is made of"),
        ({"text": "a", "system": "b"}, "plain text has no system message"),
        ({"text": " "}, "text is empty"),
    ],
)
def test_columns_that_make_no_row_are_refused(columns: dict[str, str], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Data(columns=columns)


def test_tools_in_a_column_as_json(source: Callable[..., Source]) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    (example,) = source({"messages": json.dumps(TALK[:3]), "tools": json.dumps(tools)}).examples
    assert example.tools == tuple(tools)
