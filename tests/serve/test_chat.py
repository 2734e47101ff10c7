"""A conversation held by a script: what the slash commands do, and that a swap keeps the turns and drops the cache."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_lora.adapters.attach import build
from mlx_lora.config import Adapter
from mlx_lora.models.load import LoadedModel, load_stored
from mlx_lora.serve.chat import Chat
from mlx_lora.serve.engine import Engine
from mlx_lora.store import adapter as store
from mlx_lora.store import registry

Talk = Callable[..., tuple[Chat, str, str]]


@pytest.fixture
def stored(home: Path, tiny_path: Path, tiny: LoadedModel) -> None:
    """Two adapters in the home, and one that belongs to another base."""
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


def test_help_names_every_command(talk: Talk) -> None:
    chat, out, _ = talk("/help")
    for word in ("/adapters", "/use", "/base", "/system", "/set", "/reset", "/save", "/help", "/bye", "/?"):
        assert word in out
