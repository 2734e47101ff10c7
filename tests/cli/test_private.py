"""What a person is promised: no command but `pull` connects to anything, and the home is the user's alone."""

from __future__ import annotations

import io
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from mlx_lora.cli import app
from mlx_lora.config import Recipe
from mlx_lora.tasks import quickstart, selftest
from tests.cli.conftest import Ran
from tests.models.test_gguf import tiny as write_gguf

Run = Callable[..., Ran]


def every_command(group: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command there is."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from every_command(command, (*prefix, name))
        else:
            yield (*prefix, name)


def shorter_quickstart(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe: Callable[[str], Recipe] = quickstart._recipe

    def shorter(task: str) -> Recipe:
        whole = recipe(task)
        return whole.model_copy(update={"train": whole.train.model_copy(update={"iters": 1})})

    monkeypatch.setattr(quickstart, "_recipe", shorter)
    monkeypatch.setattr(quickstart, "TASKS", quickstart.TASKS[:1])
    monkeypatch.setattr(quickstart, "MAX_TOKENS", 1)
    monkeypatch.setattr(quickstart, "FUSED_ROWS", 2)


def short_recipe(folder: Path, model: Path, data: Path) -> Path:
    file = folder / "short.yaml"
    file.write_text(f"model: {model}\ndata: {{path: {data}}}\ntrain: {{iters: 1}}\n")
    return file


@pytest.mark.real
def test_no_command_but_pull_tries_to_connect(
    monkeypatch: pytest.MonkeyPatch, run: Run, data: Path, tiny_path: Path, tmp_path: Path
) -> None:
    """Every attempt of Python code to connect or to look a name up is recorded, and there are none."""
    attempts: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: attempts.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **named: attempts.append(arguments) or [])
    monkeypatch.setattr(selftest, "PARTS", {"base": selftest.PARTS["base"]})
    shorter_quickstart(monkeypatch)
    recipe = short_recipe(tmp_path, tiny_path, data)
    base = ("--model", tiny_path)
    commands: list[tuple[Any, ...]] = [
        ("doctor",),
        ("settings",),
        ("selftest",),
        ("quickstart",),
        ("bench", "--rows", 1, "--length", 8, "--by-length", 8),
        ("import-gguf", write_gguf(tmp_path / "base.gguf"), "--name", "base"),
        ("import-gguf", "--list"),
        ("models", "list"),
        ("models", "path", "base"),
        ("data", "check", data, *base, "--allow-leaks"),
        ("data", "split", data / "train.jsonl", "--out", tmp_path / "parts", "--valid", 0.4, "--test", 0),
        ("data", "convert", data / "train.jsonl", "--out", tmp_path / "converted.jsonl"),
        ("data", "canaries", data, "--out", tmp_path / "planted", "--each", 1, "--repeat", 1),
        ("data", "redact", data / "train.jsonl", "--out", tmp_path / "redacted.jsonl"),
        ("quantize", tiny_path, tmp_path / "q", "--verify", data),
        ("init", *base, "--data", data, "--out", tmp_path / "first.yaml", "--yes"),
        ("plan", *base, "--data", data),
        ("train", *base, "--data", data, "--name", "a", "train.iters=1"),
        ("tune", *base, "--data", data, "--minutes", 1, "train.iters=1", "train.learning_rate=0.01", "adapter.rank=4"),
        ("eval", *base, "--adapter", "a", "--data", data, "--exact", "--score", "auto", "--max-tokens", 2),
        ("generate", *base, "--adapter", "a", "--prompt", "x", "--max-tokens", 2),
        ("chat", *base, "--adapter", "a"),
        ("run", data / "test.jsonl", *base, "--adapter", "a", "--out", tmp_path / "answers.jsonl", "--max-tokens", 2),
        ("verdict", *base, "--adapter", "a", "--data", data, "--max-tokens", 2),
        ("adapters", "blend", "a", "--scale", 0.5, "--name", "half", *base),
        ("fuse", *base, "--adapter", "a", "--out", tmp_path / "f"),
        ("export", "gguf", *base, "--adapter", "a", "--out", tmp_path / "a.gguf"),
        ("export", "hf", *base, "--adapter", "a", "--out", tmp_path / "hf"),
        ("export", "lmstudio", *base, "--adapter", "a", "--out", tmp_path / "l"),
        ("export", "ollama", *base, "--adapter", "a", "--out", tmp_path / "o", "--as-adapter", "--from", "x"),
        ("adapters", "list"),
        ("adapters", "show", "a"),
        ("adapters", "path", "a"),
        ("adapters", "verify", "a", *base),
        ("adapters", "merge", "a:0.5", "a:-0.2", "--name", "c", "--method", "cat"),
        ("adapters", "export", "a", "--to", "peft", "--out", tmp_path / "peft", *base),
        ("adapters", "import", tmp_path / "peft", "--name", "d", *base),
        ("study", "subspace", "a", "c"),
        ("study", "leaks", "a", "--data", data, "--rows", 2),
        ("study", "compare", recipe, "--name", "compared"),
        ("adapters", "rename", "a", "b"),
        ("runs", "list"),
        ("runs", "show", "b"),
        ("runs", "compare", "b", "b"),
        ("report", "b", "--out", tmp_path / "report.html"),
        ("runs", "path", "b"),
        ("runs", "remove", "b", "--yes"),
        ("adapters", "remove", "b", "--yes"),
    ]
    known = set(every_command(typer.main.get_command(app)))
    tried = {words[:2] if words[:2] in known else words[:1] for words in commands}
    assert tried == known - {("pull",), ("serve",)}, "a command is missing here"
    for words in commands:
        monkeypatch.setattr("sys.stdin", io.StringIO("/set max_tokens 2\nhello\n"))
        ran = run(*words)
        assert ran.code == 0, (words, ran.err)
    monkeypatch.setattr("mlx_lora.cli.serve._say", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    assert run("serve", *base, "--port", 0).code == 130
    missing = run("generate", "--model", "someone/some-model", "--prompt", "x")
    assert missing.code == 1 and attempts == []


@pytest.fixture
def open_umask() -> Iterator[None]:
    """What a system that hides nothing makes of new files."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.real
def test_what_is_in_the_home_is_the_users_alone(
    run: Run, home: Path, data: Path, tiny_path: Path, tmp_path: Path, open_umask: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ("--model", tiny_path)
    for words in (
        ("doctor",),
        ("quantize", tiny_path, home / "models" / "q", "--bits", 4),
        ("train", *base, "--data", data, "--name", "a", "train.iters=3", "train.save_every=1", "train.eval_every=1"),
        ("eval", *base, "--adapter", "a", "--data", data),
        ("verdict", *base, "--adapter", "a", "--data", data, "--max-tokens", 2),
        ("adapters", "merge", "a:0.5", "a:-0.2", "--name", "c", "--method", "svd"),
        ("study", "compare", short_recipe(tmp_path, tiny_path, data), "--name", "compared"),
        ("fuse", *base, "--adapter", "a", "--out", home / "models" / "f"),
        ("chat", *base, "--adapter", "a"),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
        ran = run(*words)
        assert ran.code == 0, (words, ran.err)
    modes = {str(path.relative_to(home)): path.stat().st_mode & 0o777 for path in [home, *home.rglob("*")]}
    assert len(modes) > 10
    assert {path: oct(mode) for path, mode in modes.items() if mode & 0o077} == {}


def test_a_saved_conversation_is_the_users_alone(
    run: Run, tiny_path: Path, tmp_path: Path, open_umask: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "talk.jsonl"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/set max_tokens 2\nhello\n/save {file}\nagain\n/save {file}\n"))
    assert run("chat", "--model", tiny_path).code == 0
    assert file.stat().st_mode & 0o777 == 0o600 and len(file.read_text().splitlines()) == 2
