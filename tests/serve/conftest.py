"""A chat on the tiny base: a service that the tests of a module share, with adapters in each test's own home."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.serve.answer import prompt_tokens
from mlx_lora.serve.chat import Chat
from mlx_lora.serve.service import Prompt, Reply, Service, open_service
from tests.serve.test_service import save_adapter

Talk = Callable[..., tuple[Chat, str, str]]
Asked = list[tuple[str | None, list[int]]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home for what the tests share."""
    path = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_LORA_HOME", str(path))
        yield path


@pytest.fixture(scope="module")
def adapters(place: Path, tiny_path: Path) -> Path:
    """Two adapters, `two` of single questions, one without a template, and one that belongs to another base."""
    save_adapter(place / "one", tiny_path, 1, data=[{"file": "train.jsonl", "answers": 3}])
    save_adapter(place / "two", tiny_path, 2, data=[{"file": "train.jsonl", "answers": 1}])
    save_adapter(place / "plain", tiny_path, 3, template="none")
    save_adapter(place / "foreign", tiny_path, 4, base={"name": "elsewhere", "fingerprint": "0" * 64})
    return place


@pytest.fixture(scope="module")
def opened(place: Path, tiny_path: Path) -> Iterator[Service]:
    with open_service(str(tiny_path)) as service:
        yield service


@pytest.fixture
def service(opened: Service, adapters: Path, home: Path) -> Service:
    for path in adapters.iterdir():
        if path.is_dir() and (path / "manifest.json").exists():
            shutil.copytree(path, home / "adapters" / path.name)
    return opened


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Who was asked, and the tokens that were sent."""
    found: Asked = []
    ask = Service.ask

    def recording(self: Service, prompt: Prompt, adapter: str | None = None, **options: Any) -> Reply:
        found.append((adapter, list(prompt.tokens)))
        return ask(self, prompt, adapter, **options)

    monkeypatch.setattr(Service, "ask", recording)
    return found


@pytest.fixture
def talk(service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    def hold(*lines: str, adapter: str | None = None) -> tuple[Chat, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        chat = Chat(service, adapter)
        chat.settings["max_tokens"] = 4
        chat.run()
        printed = capsys.readouterr()
        return chat, printed.out, printed.err

    return hold


def interrupt(*arguments: Any, **named: Any) -> None:
    raise KeyboardInterrupt


def sent(chat: Chat, *messages: dict[str, Any]) -> list[int]:
    return prompt_tokens(chat.service.tokenizer, messages)
