"""A conversation held by a script: what the slash commands do, and that a swap keeps the turns and drops the cache."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_lora.adapters.attach import build
from mlx_lora.config import Adapter
from mlx_lora.models.load import LoadedModel, load, load_stored
from mlx_lora.serve.answer import prompt_tokens
from mlx_lora.serve.chat import Chat
from mlx_lora.serve.conversation import Trained
from mlx_lora.serve.engine import Engine
from mlx_lora.store import adapter as store
from mlx_lora.store import registry
from tests.conftest import VOCABULARY, write_model

Talk = Callable[..., tuple[Chat, str, str]]


@pytest.fixture
def stored(home: Path, tiny_path: Path, tiny: LoadedModel) -> None:
    """Two adapters in the home, `two` of single questions, and one that belongs to another base."""
    base = registry.describe_base(load_stored(tiny_path))
    for seed, name in enumerate(("one", "two", "foreign")):
        config = Adapter(rank=2)
        wrappers = build(tiny.model, config, seed=seed)
        for index, wrapper in enumerate(wrappers.values()):
            wrapper.lora_b = mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(10 * seed + index))
        manifest = store.Manifest(
            method="lora",
            adapter=config.model_dump(),
            modules=list(wrappers),
            scales={path: wrapper.scale for path, wrapper in wrappers.items()},
            base=base if name != "foreign" else store.Base(name="elsewhere", fingerprint="0" * 64),
            template="chat",
            data=[{"file": "train.jsonl", "answers": 1 if name == "two" else 3}],
        )
        store.save(home / "adapters" / name, wrappers, manifest, 3)


@pytest.fixture
def talk(tiny: LoadedModel, stored: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    def hold(*lines: str) -> tuple[Chat, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        chat = Chat(Engine(tiny))
        chat.settings["max_tokens"] = 4
        chat.run()
        printed = capsys.readouterr()
        return chat, printed.out, printed.err

    return hold


def test_turns_are_kept_and_answered(talk: Talk) -> None:
    chat, out, _ = talk("hello", "again")
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "user", "assistant"]
    assert chat.messages[1]["content"] in out


def test_use_swaps_says_the_milliseconds_and_keeps_the_conversation(talk: Talk) -> None:
    chat, out, err = talk("hello", "/use one", "/adapters")
    assert chat.engine.current == "one" and "one in " in err and " ms" in err
    assert len(chat.messages) == 2 and chat.engine.cache.layers is None
    assert "* one" in out and "  two" in out and "foreign" not in out
    chat, _, _ = talk("/use two", "/base")
    assert chat.engine.current is None


def test_the_base_is_the_same_object_after_a_swap(talk: Talk, tiny: LoadedModel) -> None:
    weight = tiny.model.layers[0].self_attn.q_proj.weight
    chat, _, _ = talk("/use one", "/use two", "/base")
    assert chat.engine.loaded.model.layers[0].self_attn.q_proj.weight is weight


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


@pytest.fixture
def strict(tmp_path: Path) -> Chat:
    """A chat whose template refuses two user turns in a row."""
    path = write_model(tmp_path / "strict")
    (path / "chat_template.jinja").write_text(ALTERNATING)
    chat = Chat(Engine(load(path)))
    chat.settings["max_tokens"] = 4
    return chat


def interrupt(*arguments: Any, **named: Any) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_before_the_first_piece_leaves_no_unanswered_turn(
    strict: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(type(strict.engine.loaded.model.layers[-1]), "__call__", interrupt)
        strict.say("first")
    assert strict.messages == [] and strict.draft == "first"
    assert "taken back" in capsys.readouterr().err
    strict.say("second")
    strict.say("third")
    assert [message["content"] for message in strict.messages[::2]] == ["second", "third"]


def test_an_empty_answer_leaves_no_unanswered_turn(
    strict: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "ends", set(range(VOCABULARY)))
        strict.say("first")
    assert strict.messages == [] and "the answer is empty" in capsys.readouterr().err
    strict.say("second")
    assert [message["role"] for message in strict.messages] == ["user", "assistant"]


def test_ctrl_c_inside_an_answer_keeps_what_came(
    strict: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("mlx_lora.ui.piece", interrupt)  # while the first piece is on its way to the screen
        strict.say("first")
    assert [message["role"] for message in strict.messages] == ["user", "assistant"] and strict.draft == ""
    assert "(stopped)" in capsys.readouterr().err
    strict.say("second")
    assert len(strict.messages) == 4


@pytest.mark.parametrize("word", ["/exit", "/quit", "/bye", "exit", "quit"])
def test_exit_leaves(talk: Talk, word: str) -> None:
    chat, out, err = talk("hello", word, "never read")
    assert len(chat.messages) == 2 and "error" not in err
    assert ("a space before" in err) == (not word.startswith("/"))


def test_a_space_before_exit_sends_the_word(talk: Talk) -> None:
    chat, _, _ = talk(" exit", "again")
    assert [message["content"] for message in chat.messages[::2]] == ["exit", "again"]


def test_an_adapter_of_single_questions_answers_without_history(talk: Talk) -> None:
    chat, _, err = talk("/use two", "one", "two", "three")
    assert err.count("two was trained on single questions") == 1 and "/history on" in err
    alone = prompt_tokens(chat.engine.loaded.tokenizer, [{"role": "user", "content": "three"}])
    assert chat.engine.cache.tokens[: len(alone)] == alone, "the third question is sent by itself"
    assert len(chat.messages) == 6, "the turns stay, for /history on and /save"


def test_history_can_be_chosen_and_set_shows_it(talk: Talk) -> None:
    chat, out, err = talk("/use two", "/set", "/history on", "/set", "one", "two", "/history maybe")
    assert "history      off" in out and "history      on" in out and "takes on or off" in err
    whole = prompt_tokens(chat.engine.loaded.tokenizer, chat.messages[:3])
    assert chat.engine.cache.tokens[: len(whole)] == whole
    chat, _, err = talk("/history off", "one", "two")
    alone = prompt_tokens(chat.engine.loaded.tokenizer, chat.messages[2:3])
    assert chat.engine.cache.tokens[: len(alone)] == alone and "single questions" not in err


def test_a_system_message_goes_with_each_question_without_history(talk: Talk, tmp_path: Path) -> None:
    """And each is saved as a row of its own, as it was sent."""
    file = tmp_path / "rows.jsonl"
    chat, _, _ = talk("/system be brief", "/use two", "one", "two", f"/save {file}")
    sent = prompt_tokens(chat.engine.loaded.tokenizer, [chat.messages[0], chat.messages[3]])
    assert chat.engine.cache.tokens[: len(sent)] == sent
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


def test_the_base_follows_the_models_own_template(tiny: LoadedModel) -> None:
    engine = Engine(tiny)
    engine.add("plain", {})
    engine.use("plain")
    chat = Chat(engine, Trained(template="none"))
    assert chat.template == "none"
    chat.base("")
    assert chat.template == "chat"


def test_help_names_every_command(talk: Talk) -> None:
    chat, out, _ = talk("/help")
    for word in ("/adapters", "/use", "/base", "/system", "/set", "/history", "/reset", "/save", "/help", "/bye", "/?"):
        assert word in out
