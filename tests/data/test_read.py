"""Files become examples; every fault is reported with its file and line, and quotes little of the row."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.config import Data
from mlx_lora.data.fit import encode_file
from mlx_lora.data.read import find_splits, read
from mlx_lora.data.sources import FORMATS
from mlx_lora.errors import DataError
from tests.data.conftest import ROWS, message

GOOD = b'{"prompt": "a", "completion": "b"}'
TEXT = b'{"text": "x"}'


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    def write(content: bytes | Any, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode() + b"\n")
        return path

    return write


@pytest.mark.parametrize("name", ROWS)
def test_every_format_is_detected_and_can_be_asked_for(file: Callable[..., Path], name: str) -> None:
    expected = {"completion": "completions"}.get(name.split()[0], name.split()[0])
    detected, asked = (read(file(ROWS[name]), Data(format=choice)) for choice in ("auto", expected))
    assert detected.problems == [] and len(detected.examples) == 1
    assert detected.format == expected
    assert asked == detected


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_of_another_format_than_the_chosen_is_a_problem(file: Callable[..., Path], name: str) -> None:
    source = read(file({"question": "a"}), Data(format=name))
    (problem,) = source.problems
    assert problem.problem.startswith(f"not a row of format {name}: its keys are 'question'; known are")


@pytest.mark.parametrize(
    ("content", "name", "lines", "faults"),
    [
        (GOOD + b"\n" + GOOD + b"\n", "a.jsonl", [1, 2], []),
        (GOOD + b"\n" + GOOD, "a.jsonl", [1, 2], []),
        (b"\xef\xbb\xbf" + GOOD + b"\r\n" + GOOD + b"\r\n", "a.jsonl", [1, 2], []),
        (b"\n\n" + GOOD + b"\n  \n\n" + GOOD, "a.jsonl", [3, 6], []),
        ('{"text": "line\u2028separator\x85"}'.encode() + b"\n" + TEXT, "a.jsonl", [1, 2], []),
        (GOOD + b'\n{"prompt": "a",\n' + GOOD, "a.jsonl", [1, 3], [(2, "not valid JSON (Expecting property name")]),
        (GOOD + b"\n" + TEXT + b"\n" + GOOD, "a.jsonl", [1, 3], [(2, "not a row of format completions")]),
        (TEXT + b"\n" + GOOD, "a.jsonl", [1], [(2, "not a row of format text")]),
        (b'{"a": 1}\n' + TEXT, "a.jsonl", [], [(1, "no format has the keys 'a'")]),
        (b"5\n" + TEXT, "a.jsonl", [2], [(1, "a row is a JSON object, this is int")]),
        (TEXT + b"\n" + b'{"text": "\xff"}', "a.jsonl", [1, 2], []),
        ('{"text": "éé"}\n{"text": "'.encode() + b'\xff"}', "a.jsonl", [], [(2, "is not UTF-8 (byte 27 of the file)")]),
        (b'{"text": "a\\ud800b"}\n' + TEXT, "a.jsonl", [2], [(1, "half a character")]),
        (b'{"text": "\\ud83d\\ude00"}', "a.jsonl", [1], []),
        (b'{"text": ' + b"9" * 5000 + b"}", "a.jsonl", [], [(1, "a number with too many digits")]),
        (b'{"text": ' + b"[" * 200000, "a.jsonl", [], [(1, "nested too deeply")]),
        (b"", "a.jsonl", [], [(0, "is empty")]),
        (b"\n \n", "a.jsonl", [], [(0, "is empty")]),
        (b"[" + TEXT + b"," + TEXT + b"]", "a.json", [1, 1], []),
        (b"\n[\n" + TEXT + b",\n\n" + TEXT + b"\n]\n", "a.json", [3, 5], []),
        (b'[\n{\n"text":\n"x"\n},\n{"text": ""},\n' + TEXT + b"]", "a.json", [2, 7], [(6, "'text' is empty")]),
        (b"\xef\xbb\xbf[" + TEXT + b"]", "a.json", [1], []),
        (b"[]", "a.json", [], [(0, "is empty")]),
        (b"", "a.json", [], [(0, "is empty")]),
        (TEXT, "a.json", [], [(0, "a .json file holds one list")]),
        (TEXT + b"\n" + TEXT, "a.json", [1, 2], []),
        (b"[\n" + TEXT + b",\n", "a.json", [2], [(3, "not valid JSON")]),
    ],
    ids=[
        "lf", "no-last-newline", "bom-and-crlf", "blank-lines", "unicode-separators", "broken-json", "mixed",
        "mixed-after-text", "unknown-first", "number", "latin1", "damaged", "lone-surrogate",
        "surrogate-pair", "digits", "deep", "empty",
        "blank", "list", "list-lines", "list-fault-line", "list-bom", "list-empty", "json-empty",
        "json-object", "json-is-jsonl", "json-broken",
    ],
)  # fmt: skip
def test_rows_and_faults_stand_on_their_lines(
    file: Callable[..., Path], content: bytes, name: str, lines: list[int], faults: list[tuple[int, str]]
) -> None:
    path = file(content, name)
    source = read(path, Data())
    assert source.lines == lines and len(source.examples) == len(lines)
    assert [problem.line for problem in source.problems] == [line for line, _ in faults]
    for problem, (_, said) in zip(source.problems, faults, strict=True):
        assert said in problem.problem
        assert problem.file == str(path)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a"}, "no format has the keys 'prompt'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "has rejected answers alone"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"prompt": " ", "completion": "b"}, "'prompt' is empty"),
        ({"prompt": "a", "completion": None}, "'completion' is NoneType, not a string: None"),
        ({"prompt": ["a"], "completion": "b"}, "'prompt' is list, not a string"),
        ({"prompt": [message("user", "a")], "completion": []}, "no assistant message, nothing to learn"),
        (
            {"prompt": [message("user", "a"), message("assistant", "b")], "completion": [message("user", "c")]},
            "'completion' has no assistant message",
        ),
        ({"text": 5}, "'text' is int, not a string: 5"),
        ({"messages": {}}, "'messages' is not a list"),
        ({"messages": []}, "no assistant message"),
        ({"messages": [message("user", "a")]}, "no assistant message, nothing to learn"),
        ({"messages": ["a"]}, "message 1 is str, not an object with role and content"),
        ({"messages": [message("robot", "a")]}, "message 1 has role 'robot'; known: system, developer, user"),
        ({"messages": [{"content": "a"}]}, "message 1 has role None"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "message 1 has role ['user']"),
        ({"messages": [message("user", None)]}, "message 1 (user) has content of type NoneType"),
        ({"messages": [message("user", "a"), message("assistant", " ")]}, "message 2 (assistant) is empty"),
        ({"messages": [message("assistant", "", tool_calls="f")]}, "message 1 has tool_calls that are not a list"),
        (
            {"messages": [message("assistant", "", tool_calls=[{"function": {"arguments": "[" * 500 + "]" * 500}}])]},
            "nested too deeply",
        ),
        ({"text": json.loads("[" * 300 + "]" * 300)}, "nested too deeply"),
        ({"messages": [message("assistant", "a")], "tools": "f"}, "'tools' is not a list of objects: 'f'"),
        ({"messages": [message("assistant", "a")], "tools": [1]}, "'tools' is not a list of objects"),
        ({"instruction": "a", "output": [1]}, "'output' is list"),
        ({"instruction": "a", "output": "b", "input": 5}, "'input' is int"),
        ({"instruction": "a", "output": "b", "history": 5}, "'history' is not a list of [question, answer] pairs"),
        ({"instruction": "a", "output": "b", "history": [["q"]]}, "'history' is not a list of"),
        ({"instruction": "a", "output": "b", "history": [["q", 5]]}, "message 2 (assistant) has content of type int"),
        ({"conversations": {}}, "'conversations' is not a list"),
        ({"conversations": "a"}, "'conversations' is text, and not a JSON list of messages"),
        ({"conversations": [{"from": "bot", "value": "a"}]}, "turn 1 is from 'bot'; known: assistant, chatgpt"),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, "turn 1 is from ['human']"),
        ({"conversations": [{"from": "human"}]}, "message 1 (user) has content of type NoneType"),
    ],
)
def test_a_faulty_row_is_a_problem_on_its_line(file: Callable[..., Path], row: Any, said: str) -> None:
    (problem,) = read(file(row), Data()).problems
    assert problem.line == 1
    assert problem.problem.startswith(said)


SECRET = "S" * 500
LEAKS: list[Any] = [
    SECRET,
    {SECRET: 1},
    {"text": [SECRET]},
    {"prompt": SECRET, "completion": {"a": SECRET}},
    {"messages": [message(SECRET, SECRET)]},
    {"messages": [SECRET]},
    {"messages": [message("user", SECRET)]},
    {"messages": [message("assistant", SECRET, tool_calls=SECRET)]},
    {"messages": [message("assistant", SECRET)], "tools": SECRET},
    {"instruction": SECRET, "output": [SECRET]},
    {"instruction": SECRET, "output": SECRET, "history": SECRET},
    {"conversations": [{"from": SECRET, "value": SECRET}]},
    {"conversations": [{"from": "gpt", "value": [SECRET]}]},
]


@pytest.mark.parametrize(
    "content",
    [json.dumps(row) for row in LEAKS] + [f'{{"text": "{SECRET}', f'{{"text": "{SECRET}\\ud800"}}', f"{SECRET}: 1"],
)
def test_an_error_carries_at_most_40_characters_of_a_field(file: Callable[..., Path], content: str) -> None:
    for choice in ("auto", "completions"):
        problems = read(file(content.encode()), Data(format=choice)).problems
        assert problems
        for problem in problems:
            assert max((len(run) for run in re.findall("S+", problem.problem)), default=0) <= 40


def test_a_templates_error_carries_at_most_40_characters(encoder: Any, file: Callable[..., Path]) -> None:
    row = {"messages": [message("user", SECRET), message("assistant", "a")]}
    (problem,) = encode_file(file(row), encoder("quoting")).problems
    assert "refuses this conversation" in problem.problem
    assert problem.problem.count("S") <= 40


def test_the_message_of_many_problems_shows_the_first_and_counts_the_rest(file: Callable[..., Path]) -> None:
    problems = read(file(b"5\n" * 9), Data()).problems
    message = DataError(problems).message
    assert len(problems) == 9 and message.count("JSON object") == DataError.SHOWN and "and 4 more" in message


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["train.jsonl"], {"train": "train.jsonl"}),
        (["train.json", "valid.jsonl"], {"train": "train.json", "valid": "valid.jsonl"}),
        (["test.jsonl"], {"test": "test.jsonl"}),
        (["train.jsonl", "valid.json", "test.jsonl", "notes.txt"],
         {"train": "train.jsonl", "valid": "valid.json", "test": "test.jsonl"}),
    ],
)  # fmt: skip
def test_the_files_of_a_folder(tmp_path: Path, names: list[str], found: dict[str, str]) -> None:
    for name in names:
        (tmp_path / name).write_bytes(TEXT)
    assert {split: path.name for split, path in find_splits(tmp_path).items()} == found


@pytest.mark.parametrize(
    ("names", "asked", "said"),
    [
        ([], "nowhere", "no such file or folder"),
        ([], ".", "has no train.jsonl"),
        (["rows.jsonl"], ".", "has no train.jsonl"),
        (["rows.mp3"], "rows.mp3", "not a kind of file that is read here"),
        (["rows"], "rows", "not a kind of file that is read here"),
        (["notes.md", "rows.csv"], ".", "has no train.jsonl, valid.jsonl or test.jsonl, but rows.csv"),
        ([".notes.md"], ".", "has no train.jsonl"),
        (["rows.pkl"], "rows.pkl", "is never opened: a .pkl file can be a pickle"),
        (["train.json", "train.jsonl"], ".", "has both train.jsonl and train.json"),
    ],
)
def test_a_path_without_usable_files(tmp_path: Path, names: list[str], asked: str, said: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(TEXT)
    with pytest.raises(DataError, match=said):
        find_splits(tmp_path / asked)
