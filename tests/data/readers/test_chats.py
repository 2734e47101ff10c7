"""WhatsApp, Telegram and the exports of assistants: their variants and their traps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.config import Data
from mlx_lora.data.read import Source, read
from mlx_lora.data.readers import kind
from mlx_lora.data.readers.chats import GAP
from tests.data.readers.made import CLAUDE, GPT, telegram


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., Source]:
    """`source(text or JSON value, me="Ben")`: an export, read."""

    def make(export: Any, name: str = "_chat.txt", **settings: Any) -> Source:
        file = tmp_path / (name if isinstance(export, str) else "result.json")
        file.write_text(export if isinstance(export, str) else json.dumps(export), encoding="utf-8")
        return read(file, Data(**settings))

    return make


def talks(source: Source) -> list[list[str]]:
    assert source.problems == []
    found = []
    for example in source.examples:
        roles = [message["role"] for message in example.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        found.append([message["content"] for message in example.messages])
    return found


HEADERS = {
    "ios": "[31/12/2024, 22:10:{:02}] ",
    "ios-mark": "\u200e[31/12/2024, 22:10:{:02}] ",
    "ios-12h": "[12/31/24, 10:10:{:02}\u202fPM] ",
    "ios-dots": "[31.12.24, 22:10:{:02}] ",
    "android": "31/12/2024, 22:{:02} - ",
    "android-12h": "12/31/24, 10:{:02}\u202fPM - ",
    "android-spanish": "31/12/24, 10:{:02} p.\u00a0m. - ",
    "android-german": "31.12.24, 22:{:02} - ",
    "year-first": "2024/12/31, 22:{:02} - ",
    "dashes": "2024-12-31 22:{:02} - ",
    "hungarian": "2024. 12. 31. 22:{:02} - ",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_headers_of_all_languages(source: Callable[..., Source], header: str) -> None:
    lines = ["Ana: hi: there", "second line", "third", "Ben: hello", "\u200eAna added Cem"]
    text = "\n".join((header.format(index) if ": " in line or "added" in line else "") + line
                     for index, line in enumerate(lines))  # fmt: skip
    found = source(text, me="Ben")
    assert talks(found) == [["hi: there\nsecond line\nthird", "hello"]]
    assert found.notes == ["1 system lines and media left out"]


@pytest.mark.parametrize(
    "text",
    ["\u200eimage omitted", "<Media omitted>", "<Medien ausgeschlossen>", "IMG-2024.jpg (file attached)", "null",
     "\u200e<attached: 0001-PHOTO.jpg>"],
)  # fmt: skip
def test_media_and_edits_are_no_words(source: Callable[..., Source], text: str) -> None:
    found = source(
        f"1/13/24, 10:00 - Ana: {text}\n1/13/24, 10:00 - Ana: a <b>?\n"
        "1/13/24, 10:01 - Ben: yes <This message was edited>\n",
        me="Ben",
    )
    assert talks(found) == [["a <b>?", "yes"]]


@pytest.mark.parametrize(
    ("dates", "parted"),
    [
        (["13/01/24", "14/01/24"], True),  # a number above 12 in front: days
        (["01/13/24", "01/14/24"], True),
        (["01/02/24", "02/02/24"], True),
        (["03/12/24", "04/01/24"], True),  # only month first goes on in time
        (["05/05/24", "05/05/24"], False),
    ],
)
def test_gaps_part_conversations_in_either_order_of_day_and_month(
    source: Callable[..., Source], dates: list[str], parted: bool
) -> None:
    first, second = dates
    text = f"{first}, 09:00 - Ana: a\n{first}, 09:01 - Ben: b\n{second}, 09:02 - Ana: c\n{second}, 09:03 - Ben: d\n"
    assert talks(source(text, me="Ben")) == ([["a", "b"], ["c", "d"]] if parted else [["a", "b", "c", "d"]])


def test_an_order_that_nothing_tells_is_said(source: Callable[..., Source]) -> None:
    found = source("01/02/24, 09:00 - Ana: a\n01/02/24, 09:01 - Ben: b\n", me="Ben")
    assert found.notes == ["dates are read as day, month, year; nothing in the file tells their order"]


def test_a_name_may_hold_a_colon(source: Callable[..., Source]) -> None:
    text = "1/13/24, 10:00 - Ana: a\n1/13/24, 10:01 - Ben: Work: b\n"
    assert talks(source(text, me="Ben: Work")) == [["a", "b"]]


def test_in_a_group_questions_begin_with_a_name(source: Callable[..., Source]) -> None:
    text = "".join(
        f"1/13/24, 10:0{minute} - {said}\n"
        for minute, said in enumerate(["Ana: one", "Cem: two", "Ben: three", "Ben: four", "Cem: five"])
    )
    found = source(text, me="Ben")
    assert talks(found) == [["Ana: one\nCem: two", "three\nfour"]]
    assert found.notes == ["1 messages that nobody answers left out"]
    assert found.lines == [1]


def test_a_text_is_only_a_chat_if_it_looks_like_one(tmp_path: Path) -> None:
    texts = {
        "chat": ("1/13/24, 10:00 - Ana: a\n1/13/24, 10:00 - Ben: b\n", "whatsapp"),
        "diary": ("1/13/24\nslept late\n", "document"),
        "one": ("[1/13/24, 10:00:00] the only date\nslept late\n", "document"),
        "later": ("minutes\n1/13/24, 10:00 - Ana: a\n1/13/24, 10:00 - Ben: b\n", "document"),
    }
    for name, (text, expected) in texts.items():
        file = tmp_path / f"{name}.txt"
        file.write_text(text)
        assert kind(file, Data()) == expected
        assert kind(file, Data(format="text")) == "document"


def said(who: str | None, text: Any, at: int = 0, **more: Any) -> dict[str, Any]:
    return {"from": who, "text": text, "date_unixtime": str(at), **more}


def test_telegram_of_all_chats(source: Callable[..., Source]) -> None:
    group = telegram(said("Ana", "x"), said("Cem", "y"), said("Ben", "z"), kind="private_group")
    alone = telegram(said("Ana", "q"), said("Ben", ""), said("Ben", "a", GAP), said(None, "late", 2 * GAP + 1))
    service = telegram({**said("Ana", "joined"), "type": "service"}, said("Ana", "nobody answers"))
    export = {"contacts": {"list": [{"first_name": "private"}]}, "chats": {"list": [group, alone, service]}}
    found = source(export, me="ben")
    assert talks(found) == [["Ana: x\nCem: y", "z"], ["Ana: q", "a"]]
    assert sorted(found.notes) == [
        "2 messages that nobody answers left out", "2 service messages and media left out",
    ]  # fmt: skip


def test_telegram_writes_control_characters_in_its_own_way(source: Callable[..., Source]) -> None:
    text = json.dumps(telegram(said("Ana", "MARK"), said("Ben", r"C:\x41")))
    found = source(text.replace("MARK", r"a\x07b"), "result.json", me="Ben")
    assert talks(found) == [["a\x07b", r"C:\x41"]]


def test_telegram_that_is_broken_names_the_line(source: Callable[..., Source]) -> None:
    text = json.dumps(telegram(said("Ana", "a"), said("Ben", "b")), indent=1)
    (problem,) = source(text[:-20], "result.json", me="Ben").problems
    assert problem.line > 10 and "not valid JSON" in problem.problem


def test_rows_that_only_look_like_an_export_are_rows(source: Callable[..., Source]) -> None:
    row = {"prompt": '"mapping": {} and "chat_messages": []', "completion": "a", "mapping_": {"mapping": {}}}
    assert talks(source(json.dumps([row]), "rows.json")) == [[row["prompt"], "a"]]
    one = {"data": [{"prompt": '{"type": "personal_chat", "messages": []}', "completion": "a"}]}
    assert talks(source(json.dumps(one), "rows.json")) == [[one["data"][0]["prompt"], "a"]]


def test_chatgpt_without_a_current_node_takes_the_newest_leaf(source: Callable[..., Source]) -> None:
    mapping = json.loads(json.dumps(GPT["mapping"]))
    mapping["b"]["message"]["create_time"], mapping["d"]["message"]["create_time"] = 2.0, 1.0
    assert talks(source([{"mapping": mapping, "current_node": None}])) == [["first try", "unwanted"]]


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ({"mapping": {"a": {"parent": "a"}}, "current_node": "a"}, None),
        ({"mapping": {"a": {"parent": ["a"], "message": 5}, "b": 7}}, None),
        ({"mapping": {"a": {"message": {"author": 1, "content": [], "metadata": 3}, "parent": None}}}, None),
        ({"title": "no tree"}, "it has no 'mapping'"),
        ([1], "a row is a JSON object, this is list"),
    ],
)
def test_a_broken_conversation_of_chatgpt_does_not_stop_the_others(
    source: Callable[..., Source], broken: Any, problem: str | None
) -> None:
    found = source([GPT, broken, GPT])
    assert len(found.examples) == 2
    assert [problem is not None and problem in each.problem for each in found.problems] == [True] * bool(problem)


def test_claude_as_a_tree_keeps_the_path_to_the_current_leaf(source: Callable[..., Source]) -> None:
    def message(own: str, parent: str, sender: str) -> dict[str, Any]:
        return {"uuid": own, "parent_message_uuid": parent, "sender": sender, "text": own}

    messages = [message("q", "0", "human"), message("bad", "q", "assistant"), message("good", "q", "assistant")]
    found = source([CLAUDE, {"chat_messages": messages, "current_leaf_message_uuid": "good"}])
    assert talks(found) == [["old form", "new form"], ["q", "good"]]
