"""No command but `pull` tries to reach anything: every connection attempt is recorded, and there are none."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Ran


def test_no_code_path_tries_to_connect(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran], data: Path, tiny_path: Path, tmp_path: Path
) -> None:
    attempts: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: attempts.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **named: attempts.append(arguments) or [])
    base = ("--model", tiny_path)
    commands = [
        ("doctor",),
        ("data", "check", data, *base),
        ("quantize", tiny_path, tmp_path / "q", "--verify", data),
        ("train", *base, "--data", data, "--name", "a", "train.iters=1"),
        ("eval", *base, "--adapter", "a", "--data", data, "--exact", "--max-tokens", 2),
        ("generate", *base, "--adapter", "a", "--prompt", "x", "--max-tokens", 2),
        ("fuse", *base, "--adapter", "a", "--out", tmp_path / "f"),
        ("adapters", "verify", "a", *base),
    ]
    for words in commands:
        assert run(*words).code == 0, words
    missing = run("generate", "--model", "someone/some-model", "--prompt", "x")
    assert missing.code == 1 and attempts == []
