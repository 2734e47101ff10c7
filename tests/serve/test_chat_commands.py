"""What changes an exchange, or looks at it: comparing, rating, retrying, editing, files, blocks of several lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.config import Data
from mlx_lora.data.read import read
from mlx_lora.serve.chat import Chat
from mlx_lora.serve.chat.files import with_files
from mlx_lora.serve.chat.lines import Line, is_open, line_of
from mlx_lora.serve.service import Reply, Service
from tests import chat_session
from tests.serve.conftest import Asked, Talk, interrupt, sent


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_compare_answers_the_last_message_by_both_and_leaves_the_conversation(talk: Talk, asked: Asked) -> None:
    chat, out, err = talk("hello", "/compare one base", "again", "/compare two one")
    question = {"role": "user", "content": "hello"}
    assert asked[1:3] == [("one", sent(chat, question)), (None, sent(chat, question))]
    assert asked[4:] == [
        ("two", sent(chat, {"role": "user", "content": "again"})), ("one", sent(chat, *chat.messages[:3])),
    ], "each as it was trained: two on single questions"  # fmt: skip
    assert len(chat.messages) == 4 and "one:" in out and "base:" in out and err.count("tokens, ") == 4


def test_both_answers_of_a_comparison_share_passes(talk: Talk, service: Service) -> None:
    talk("/use one", "/use two")
    before = service.scheduler.status()
    chat, _, _ = talk("/set max_tokens 40", "/compare one two hello")
    after = service.scheduler.status()
    generated = after.generated_tokens - before.generated_tokens
    assert generated > 4 and after.passes - before.passes < 0.8 * generated
    assert chat.messages == []


def test_compare_without_a_message_takes_the_next_one(talk: Talk, asked: Asked) -> None:
    chat, _, err = talk("/compare one two", "hello", "alone")
    assert "next message goes to both" in err
    assert [name for name, _ in asked] == ["one", "two", None] and len(chat.messages) == 2


def test_a_comparison_of_a_text_that_cant_be_sent_leaves_the_next_message_alone(talk: Talk, asked: Asked) -> None:
    chat, _, err = talk("/compare one two @absent.txt", "hello")
    assert "no such file" in err and [name for name, _ in asked] == [None] and len(chat.messages) == 2


def test_ctrl_c_in_a_comparison_ends_both_and_loses_nothing(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, _, _ = talk("hello", "/use one", "/use two")
    chat.settings["max_tokens"] = 400
    with monkeypatch.context() as patch:
        patch.setattr("mlx_lora.ui.result", interrupt)
        chat.commands.run("/compare one two")
    assert len(chat.messages) == 2
    chat.settings["max_tokens"] = 4
    chat.say("again")
    assert len(chat.messages) == 4 and chat.service.scheduler.status().running == 0


def test_good_answers_are_trained_on_and_bad_ones_left_out(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "rated.jsonl"
    chat, _, err = talk("/system be brief", f"/rate {file}", "hello", "/good", "/good", "again", "/bad")
    good, bad = rows(file)
    assert good == {"prompt": chat.messages[:2], "completion": chat.messages[2:3]}
    assert bad == {"prompt": chat.messages[:4], "rejected": chat.messages[4:]}
    assert "rated good already" in err
    learned = read(file, Data())
    assert len(learned.examples) == 1 and not learned.problems
    assert learned.examples[0].prompt_messages == 2
    assert learned.notes == ["1 row with a rejected answer is left out, for preference training to come"]


def test_a_good_and_a_bad_answer_to_one_prompt_are_a_pair(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "rated.jsonl"
    talk(f"/rate {file}", "/set temperature 2", "/set seed 3", "hello", "/bad", "/retry", "/good", "/retry", "/bad")
    first, good, pair, another = rows(file)
    assert good.keys() == {"prompt", "completion"} and first.keys() == {"prompt", "rejected"}
    assert pair == {"prompt": first["prompt"], "chosen": good["completion"], "rejected": first["rejected"]}
    assert another["chosen"] == good["completion"] and another["rejected"] not in (first["rejected"], pair["chosen"])
    assert [len(read(file, Data()).examples)] == [1]


def test_an_answer_rated_again_leaves_no_first_rating(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "rated.jsonl"
    talk(f"/rate {file}", "hello", "/good", "/bad")
    (row,) = rows(file)
    assert row.keys() == {"prompt", "rejected"}
    assert file.stat().st_mode & 0o777 == 0o600


def test_without_a_template_a_rated_row_has_texts(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "rated.jsonl"
    chat, _, _ = talk(f"/rate {file}", "/use plain", "hello", "more", "/good")
    assert rows(file) == [{"prompt": "more", "completion": chat.messages[-1]["content"]}]


def test_retry_answers_again_with_another_seed_and_with_new_settings(talk: Talk, asked: Asked) -> None:
    chat, _, _ = talk("/set seed 7", "/set temperature 2", "/set max_tokens 12", "hello", "/retry")
    assert asked[0] == asked[1] and len(chat.messages) == 2
    second = chat.messages[1]
    first, _, _ = talk("/set seed 7", "/set temperature 2", "/set max_tokens 12", "hello")
    assert first.messages[1] != second
    again, _, _ = talk("/set seed 8", "/set temperature 2", "/set max_tokens 12", "hello")
    assert again.messages[1] == second, "the next seed"
    cold, _, _ = talk("/set seed 7", "/set temperature 2", "hello", "/set temperature 0", "/retry")
    greedy, _, _ = talk("hello")
    assert cold.messages == greedy.messages


def test_a_retry_without_an_answer_keeps_the_one_before(
    talk: Talk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat, _, _ = talk("hello")
    before = list(chat.messages)
    with monkeypatch.context() as patch:
        patch.setattr(Reply, "_token", interrupt)
        chat.retry()
    assert chat.messages == before and chat.draft == "" and "the answer before stays" in capsys.readouterr().err


def test_edit_gives_the_last_message_back_as_it_was_typed(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("the note\n")
    chat, _, err = talk("hello", f"see @{tmp_path / 'note.txt'}", "/edit")
    assert chat.draft == f"see @{tmp_path / 'note.txt'}" and len(chat.messages) == 2 and "taken back" in err
    chat.commands.run("/edit")
    assert chat.draft == "hello" and chat.messages == []


def test_stats_tell_speed_prompt_and_memory(talk: Talk) -> None:
    chat, out, _ = talk("hello", "and again", "/stats")
    finished = chat.last.finished if chat.last else None
    assert finished is not None and finished.cached_tokens > 0
    read_now = finished.prompt_tokens - finished.cached_tokens
    assert f"prompt         {finished.prompt_tokens} tokens: {read_now} read, {finished.cached_tokens} cached" in out
    assert "tokens/s" in out and "memory" in out
    assert "memory" in talk("/stats")[1], "before the first answer too"


def test_a_saved_conversation_goes_on_after_load(talk: Talk, asked: Asked, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    saved, _, _ = talk("/system be brief", "hello", f"/save {file}")
    chat, _, err = talk(f"/load {file}", "again")
    assert chat.messages[:3] == saved.messages and "hello" in err
    assert asked[-1] == (None, sent(chat, *chat.messages[:4]))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("{", ":1: "),
        ('{"text": "a"}', "no list of messages"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "not questions and answers in turn"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "role 'robot'"),
    ],
)
def test_a_file_that_holds_no_conversation_changes_nothing(talk: Talk, tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "talk.jsonl"
    file.write_text(content)
    chat, _, err = talk("hello", f"/load {file}")
    assert said in err and len(chat.messages) == 2


def test_files_in_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("A\nB\n")
    Path("with space.txt").write_text("C")
    assert with_files('sum @a.txt, then @"with space.txt".', len) == "sum A\nB, then C."
    assert "(a.txt: 3 tokens)" in capsys.readouterr().err
    for text in ("write to me@a.txt", "an @ alone", "x@@y"):
        assert with_files(text, len) == text
    assert with_files("@@a.txt", len) == "@a.txt"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b" \n", "is empty"),
        ("binary.bin", b"\xff\xfe\x00", "no text in UTF-8"),
        ("large.txt", b"x" * ((1 << 20) + 1), "at most 1.05 MB"),
        ("folder/", b"", "isn't a file"),
    ],
)
def test_what_is_no_file_for_a_message_is_an_error(
    talk: Talk, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    path = tmp_path / name
    if name.endswith("/"):
        path.mkdir()
    else:
        path.write_bytes(content)
    chat, _, err = talk(f"read @{path}")
    assert said in err and chat.messages == []


def test_a_block_of_several_lines_is_one_message_as_it_stands(talk: Talk) -> None:
    chat, _, _ = talk('"""', "/use nothing", "@nowhere and exit", '"""', '"""exit"""', "bye")
    said = [message["content"] for message in chat.messages[::2]]
    assert said == ["/use nothing\n@nowhere and exit", "exit", "bye"]
    assert talk('"""', "cut off")[0].messages[0]["content"] == "cut off"


@pytest.mark.parametrize(
    ("text", "still_open", "line"),
    [
        ("hello", False, Line("hello")),
        ('"""a"""', False, Line("a", block=True)),
        ('"""', True, Line("", block=True)),
        ('"""a\n', True, Line("a", block=True)),
        ('"""\na\n"""', False, Line("a", block=True)),
    ],
)
def test_a_block_ends_at_its_quotes(text: str, still_open: bool, line: Line) -> None:
    assert is_open(text) == still_open and line_of(text) == line


def test_completion_knows_commands_adapters_settings_and_files(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.document import Document

    from mlx_lora.serve.chat.completion import ChatCompleter

    (tmp_path / "notes.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    completer = ChatCompleter(Chat(service))

    def offered(text: str) -> list[str]:
        return [one.text for one in completer.get_completions(Document(text), CompleteEvent())]

    assert offered("/us") == ["/use"] and "/bye" in offered("/")
    assert offered("/use ") == ["one", "plain", "two", "base"] and offered("/compare one t") == ["two"]
    assert offered("/set t") == ["temperature", "top_p"] and offered("/think o") == ["on", "off"]
    assert "notes.txt" in offered("see @")
    assert offered("see @not") == ["es.txt"] == offered("/save not")
    assert offered("write to me@not") == [] == offered("hello")


def test_tags_and_tables_of_formatting_can_be_switched_off(talk: Talk) -> None:
    chat, _, err = talk("/markdown off", "/markdown maybe")
    assert chat.markdown is False and "takes on or off" in err


def test_the_session_in_the_readme_types_every_command(talk: Talk) -> None:
    chat, _, _ = talk("/help")
    typed = [line.partition("> ")[2].partition(" ")[0] for line in chat_session.written().splitlines()]
    assert set(chat.commands.table) <= set(typed)
