"""A conversation held by a script: what the slash commands do, and what each adapter is sent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.errors import ModelError, NotFinite
from mlx_lora.serve.chat import Chat
from mlx_lora.serve.requests import Finished
from mlx_lora.serve.service import Reply, Service, open_service
from mlx_lora.serve.text import Piece
from tests.conftest import write_model
from tests.serve.conftest import Asked, Talk, interrupt, sent


def test_turns_are_kept_and_answered(talk: Talk) -> None:
    chat, out, _ = talk("hello", "again")
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "user", "assistant"]
    assert chat.messages[1]["content"] in out


def test_use_swaps_says_the_milliseconds_and_keeps_the_conversation(talk: Talk, asked: Asked) -> None:
    chat, out, err = talk("hello", "/use one", "/adapters", "hello")
    assert chat.adapter == "one" and "one in " in err and " ms" in err
    assert len(chat.messages) == 4 and [name for name, _ in asked] == [None, "one"]
    assert "* one" in out and "  two" in out and "foreign" not in out
    chat, _, _ = talk("/use two", "/base")
    assert chat.adapter is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/use foreign", "another base"),
        ("/use oen", "did you mean 'one'"),
        ("/use ../one", "no adapter"),
        ("/hepl", "/help"),
        ("/set temprature 1", "temperature"),
        ("/set temperature hot", "not a value"),
        ("/set max_tokens 0", "out of range"),
        ("/set temperature nan", "out of range"),
        ("/save", "/save FILE"),
        ("/load", "/load FILE"),
        ("/load nowhere.jsonl", "can't read nowhere.jsonl"),
        ("/compare one", "needs two"),
        ("/compare one tow", "did you mean 'two'"),
        ("/think maybe", "takes on or off"),
        ("/retry", "no message"),
        ("/edit", "no message"),
        ("/good", "/rate FILE"),
        ("/rate rows.csv", "/rate rows.jsonl"),
        ("see @nowhere.txt", "@nowhere.txt: there is no such file"),
    ],
)
def test_faults_are_one_line_and_the_chat_goes_on(talk: Talk, line: str, said: str) -> None:
    chat, _, err = talk(line, "hello")
    assert err.startswith("error: ") and said in err
    assert len(chat.messages) == 2


def test_system_set_reset_save_and_bye(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    chat, _, _ = talk("/system be brief", "/set temperature 0.5", "hi", f"/save {file}", "/reset", "/bye", "never read")
    assert chat.settings["temperature"] == 0.5
    assert chat.messages == [{"role": "system", "content": "be brief"}]
    (row,) = (json.loads(line) for line in file.read_text().splitlines())
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]


ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def alternating(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A base whose template refuses two user turns in a row."""
    path = write_model(tmp_path_factory.mktemp("strict") / "model")
    (path / "chat_template.jinja").write_text(ALTERNATING)
    with open_service(str(path)) as service:
        yield service


@pytest.fixture
def strict(alternating: Service) -> Chat:
    chat = Chat(alternating)
    chat.settings["max_tokens"] = 4
    return chat


def test_ctrl_c_before_the_first_piece_leaves_no_unanswered_turn(
    strict: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Reply, "_token", interrupt)
        strict.say("first")
    assert strict.messages == [] and strict.draft == "first"
    assert "taken back" in capsys.readouterr().err
    strict.say("second")
    strict.say("third")
    assert [message["content"] for message in strict.messages[::2]] == ["second", "third"]


def test_an_empty_answer_leaves_no_unanswered_turn(
    strict: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing(self: Reply) -> Iterator[Any]:
        self.finished = Finished("stop", 1, 0, 0)
        yield from ()

    with monkeypatch.context() as patch:
        patch.setattr(Reply, "__iter__", nothing)
        strict.say("first")
    assert strict.messages == [] and "the answer is empty" in capsys.readouterr().err
    strict.say("second")
    assert [message["role"] for message in strict.messages] == ["user", "assistant"]


def test_ctrl_c_inside_an_answer_keeps_what_came_and_ends_its_row(
    strict: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    strict.settings["max_tokens"] = 400
    with monkeypatch.context() as patch:
        patch.setattr(Reply, "_token", lambda self, token: Piece("x", (token,)))
        patch.setattr("mlx_lora.ui.piece", interrupt)  # while the first piece is on its way to the screen
        strict.say("first")
    assert [message["role"] for message in strict.messages] == ["user", "assistant"] and strict.draft == ""
    assert strict.messages[1]["content"] == "x"
    assert "(stopped)" in capsys.readouterr().err
    strict.settings["max_tokens"] = 4
    strict.say("second")
    assert len(strict.messages) == 4 and strict.service.scheduler.status().running == 0


def test_an_error_gives_the_message_back(strict: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError), monkeypatch.context() as patch:
        patch.setattr(Service, "ask", failing)
        strict.say("first")
    assert strict.messages == [] and strict.draft == "first"


def failing(*arguments: Any, **named: Any) -> None:
    raise NotFinite("logits are NaN")


@pytest.mark.parametrize("word", ["/exit", "/quit", "/bye", "exit", "quit"])
def test_exit_leaves(talk: Talk, word: str) -> None:
    chat, out, err = talk("hello", word, "never read")
    assert len(chat.messages) == 2 and "error" not in err
    assert ("a space before" in err) == (not word.startswith("/"))


def test_a_space_before_exit_sends_the_word(talk: Talk) -> None:
    chat, _, _ = talk(" exit", "again")
    assert [message["content"] for message in chat.messages[::2]] == ["exit", "again"]


def test_an_adapter_of_single_questions_answers_without_history(talk: Talk, asked: Asked) -> None:
    chat, _, err = talk("/use two", "one", "two", "three")
    assert err.count("two was trained on single questions") == 1 and "/history on" in err
    assert asked[-1] == ("two", sent(chat, {"role": "user", "content": "three"})), "the third is sent by itself"
    assert len(chat.messages) == 6, "the turns stay, for /history on and /save"


def test_history_can_be_chosen_and_set_shows_it(talk: Talk, asked: Asked) -> None:
    chat, out, err = talk("/use two", "/set", "/history on", "/set", "one", "two", "/history maybe")
    assert "history      off" in out and "history      on" in out and "takes on or off" in err
    assert asked[-1] == ("two", sent(chat, *chat.messages[:3]))
    chat, _, err = talk("/history off", "one", "two")
    assert asked[-1] == (None, sent(chat, chat.messages[2])) and "single questions" not in err


def test_a_system_message_goes_with_each_question_without_history(talk: Talk, asked: Asked, tmp_path: Path) -> None:
    """And each is saved as a row of its own, as it was sent."""
    file = tmp_path / "rows.jsonl"
    chat, _, _ = talk("/system be brief", "/use two", "one", "two", f"/save {file}")
    assert asked[-1] == ("two", sent(chat, chat.messages[0], chat.messages[3]))
    rows = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    assert [[message["role"] for message in row] for row in rows] == [["system", "user", "assistant"]] * 2


def test_a_swap_with_a_conversation_offers_reset(talk: Talk) -> None:
    _, _, err = talk("/use one", "hello", "/base")
    assert "earlier answers came from one" in err and "/reset" in err
    _, _, err = talk("/use one", "/base", "hello", "/use two")
    assert "/reset" not in err, "without a conversation, or without history, nothing steers"


def test_a_conversation_longer_than_the_context_is_refused_with_a_way_out(talk: Talk) -> None:
    chat, _, err = talk("hello", "x" * 600, "again")
    assert "this model's context is 512" in err and "/reset" in err
    assert [message["content"] for message in chat.messages[::2]] == ["hello", "again"]


def test_an_answer_ends_where_the_context_does(talk: Talk) -> None:
    """Beyond it the text makes no sense."""
    _, _, err = talk("x" * 506)  # and <|user|> … <|end|> newline <|assistant|>
    assert "(cut at 3 tokens; the model's context is full" in err


def test_the_base_follows_the_models_own_template_after_an_adapter_without_one(talk: Talk, asked: Asked) -> None:
    for lines, adapter in ((("hi", "/base", "hi"), "plain"), (("/use plain", "hi", "/base", "hi"), None)):
        chat, _, err = talk(*lines, adapter=adapter)
        (_, plain), (name, based) = asked[-2:]
        assert plain == chat.service.tokenizer.encode("hi") and name is None
        assert based == sent(chat, *chat.messages[:3])
        assert err.count("without a chat template") == 1 and "/reset forgets" in err


def test_help_names_every_command(talk: Talk) -> None:
    chat, out, _ = talk("/help")
    for word in (*chat.commands.table, "/bye", "@path"):
        assert word in out
