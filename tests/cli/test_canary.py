"""Of the training text nothing stays in the home, and errors show no more than the beginning of the field at fault.

A canary is a text that occurs nowhere else. It is looked for in every file, in every form that a careless line of code
could write it in.
"""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.conftest import Ran
from tests.conftest import TEMPLATE, write_model

Run = Callable[..., Ran]

CANARY = "Zyx-7319 “quagga”\tlives\\sleeps at Čapkova 12"
# Any part of it of this many characters is a leak.
PIECE = 12
INTEGERS = ("u1", "<u2", ">u2", "<i4", ">i4", "<i8", ">i8", "<f2", "<f4")


def spellings(text: str, ids: Sequence[int]) -> dict[str, bytes]:
    """A text, and its token ids, in every form in which a file may hold them."""
    numbers = [str(number) for number in ids]
    return {
        "UTF-8": text.encode(),
        "UTF-16, little": text.encode("utf-16-le"),
        "UTF-16, big": text.encode("utf-16-be"),
        "UTF-32": text.encode("utf-32-le"),
        "JSON": json.dumps(text)[1:-1].encode(),
        "JSON in UTF-8": json.dumps(text, ensure_ascii=False)[1:-1].encode(),
        "JSON in JSON": json.dumps(json.dumps(text)[1:-1])[1:-1].encode(),
        "Python": repr(text)[1:-1].encode(),
        **{f"ids as {kind}": np.array(ids).astype(kind).tobytes() for kind in INTEGERS},
        **{f"ids between {between!r}": between.join(numbers).encode() for between in (",", ", ", " ", "\n", "\n- ")},
        "ids in indented JSON": json.dumps(list(ids), indent=1)[1:-1].encode(),
    }


def pieces(text: str = CANARY) -> list[str]:
    return [text[start : start + PIECE] for start in range(len(text) - PIECE + 1)]


def leaks(tokenizer: Any, *folders: Path) -> list[tuple[str, str]]:
    """(file, form) of every piece of the canary found in a file, or in a file's name."""
    needles = {
        (form, needle)
        for piece in pieces()
        for form, needle in spellings(piece, tokenizer.encode(piece, add_special_tokens=False)).items()
    }
    found = set()
    for path in (path for folder in folders for path in folder.rglob("*")):
        content = str(path).encode() + b"\0" + (path.read_bytes() if path.is_file() else b"")
        found |= {(path.name, form) for form, needle in needles if needle in content}
    return sorted(found)


@pytest.fixture
def secret(write_rows: Callable[..., Path]) -> Path:
    """Training, validation and test rows that each hold the canary, in prompt and completion."""
    for name, count in (("train", 12), ("valid", 3), ("test", 2)):
        rows = [{"prompt": f"{index}: {CANARY}?", "completion": f"{CANARY}, {index}"} for index in range(count)]
        file = write_rows(rows, name=f"{name}.jsonl")
    return file.parent


FORMS = list(spellings("", []))


@pytest.mark.parametrize("form", FORMS)
def test_the_canary_would_be_found(form: str, home: Path, tokenizer: Any) -> None:
    """In any form, also where a file holds no more than a piece of it."""
    home.mkdir()
    middle = CANARY[9:25]
    content = spellings(middle, tokenizer.encode(middle, add_special_tokens=False))[form]
    (home / "file").write_bytes(b"before " + content + b" after")
    assert ("file", form) in leaks(tokenizer, home)


def test_of_the_training_text_nothing_stays_in_the_home(
    run: Run, home: Path, secret: Path, tiny_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor of what is evaluated, quantized on, asked and answered."""
    base = ("--model", tiny_path)
    often = ("train.eval_every=2", "train.save_every=1", "train.iters=6", "adapter.layers=1", "train.cache_prefix=on")
    for words in (
        ("data", "check", secret, *base, "--show", 2, "--allow-leaks"),
        ("train", *base, "--data", secret, "--name", "a", *often),
        ("train", *base, "--data", secret, "--name", "b", "train.iters=2", "data.packing=true", "quantize.bits=4"),
        ("eval", *base, "--adapter", "a", "--data", secret, "--exact", "--score", "json", "--max-tokens", 8),
        ("quantize", tiny_path, home / "models" / "q", "--verify", secret),
        ("fuse", *base, "--adapter", "a", "--data", secret, "--out", home / "models" / "f"),
        ("generate", *base, "--adapter", "a", "--prompt", CANARY, "--max-tokens", 8),
        ("chat", *base, "--adapter", "a"),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"/set max_tokens 8\n/system {CANARY}\n{CANARY}\n/use b\n"))
        ran = run(*words)
        assert ran.code == 0, (words, ran.err)
        if words[0] not in ("data", "chat", "generate"):  # which show it on purpose
            assert not any(piece in ran.out + ran.err for piece in pieces()), words
    assert (home / "runs" / "a" / "metrics.jsonl").is_file() and (home / "models" / "q").is_dir()
    assert leaks(tokenizer, home) == []


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(home: Path) -> Iterator[Start]:
    """Run the command line in a process of its own, which the test doesn't outlive."""
    running: list[subprocess.Popen[str]] = []

    def call(*words: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlx_lora", *map(str, words)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"MLX_LORA_HOME": str(home)},
        )  # fmt: skip
        running.append(process)
        return process

    yield call
    for process in running:
        process.kill()
        process.communicate()


def until(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.real
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nor_of_a_run_that_was_broken_off(
    number: signal.Signals, start: Start, home: Path, secret: Path, tiny_path: Path, tokenizer: Any
) -> None:
    """Checkpoints stay of it, or half of one."""
    endless = ("train.iters=100000", "train.save_every=2", "train.eval_every=3")
    words = ("train", "--model", tiny_path, "--data", secret, "--name", "a", *endless)
    process = start(*words)
    until(lambda: any((home / "runs" / "a").glob("checkpoint-*/*")), process)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGKILL)
    assert any((home / "runs" / "a").iterdir())
    assert leaks(tokenizer, home) == []
    assert not any(piece in said for piece in pieces())


@pytest.mark.real
def test_nor_of_what_was_typed_on_a_terminal(home: Path, tiny_path: Path, tokenizer: Any, tmp_path: Path) -> None:
    """A terminal's line editor likes to keep a history: not in the home, and not in the user's own directory."""
    user = tmp_path / "user"
    user.mkdir()
    ours, theirs = pty.openpty()
    environment = os.environ | {"MLX_LORA_HOME": str(home), "HOME": str(user), "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_lora", "chat", "--model", str(tiny_path)],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    typed = f"/set max_tokens 4\r{CANARY.replace(chr(9), ' ')}\r/bye\r"  # a tab would complete
    seen = b""
    try:
        while True:
            try:
                seen += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if b"\x1b[6n" in seen:  # "where is the cursor?"
                os.write(ours, b"\x1b[1;1R")
                seen = seen.replace(b"\x1b[6n", b"", 1)
            if typed and b"base>" in seen:
                os.write(ours, typed.encode())
                typed = ""
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(ours)
    assert "quagga" in seen.decode(errors="ignore")
    assert leaks(tokenizer, home, user) == []


LONG = "a" * 40 + CANARY
GOOD = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
BAD_ROWS: dict[str, Any] = {
    "a broken line": '{"prompt": "' + CANARY + '", "completion": ',
    "a stray control character": '{"prompt": "' + CANARY + '"}',
    "a list": [LONG],
    "a string": LONG,
    "unknown keys": {LONG: 1, CANARY[:0] + "b" * 40 + CANARY: 2},
    "a list for a text": {"prompt": [LONG], "completion": "b"},
    "an object for a text": {"text": {"b": LONG}},
    "another format": [{"text": "x"}, {"question": LONG}],
    "a role": {"messages": [{"role": LONG, "content": "x"}]},
    "a role that isn't a text": {"messages": [{"role": [LONG], "content": "x"}]},
    "content in parts": {"messages": [{"role": "user", "content": [LONG]}, GOOD["messages"][1]]},
    "a speaker": {"conversations": [{"from": LONG, "value": "x"}]},
    "tools": {**GOOD, "tools": LONG},
    "tool calls": {"messages": [GOOD["messages"][0], {"role": "assistant", "content": "", "tool_calls": LONG}]},
    "an empty answer": {"prompt": LONG, "completion": " "},
    "too long": {"prompt": LONG * 40, "completion": LONG},
    "an end token": {"prompt": f"{LONG}<|end|>{LONG}", "completion": LONG},
    "half a character": {"prompt": f"{LONG}\ud800{LONG}", "completion": LONG},
    "refused by the template": {"messages": [{"role": "developer", "content": LONG}, GOOD["messages"][1]]},
    "a history": {"instruction": LONG, "output": LONG, "history": LONG},
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_errors_show_no_more_than_the_beginning_of_a_field(fault: str, run: Run, home: Path, tmp_path: Path) -> None:
    """Forty characters of the field at fault, which hold a word and no secret."""
    base = write_model(tmp_path / "base")
    template = TEMPLATE.replace("'unknown role ' + m.role", "m.content")
    assert template != TEMPLATE
    (base / "chat_template.jinja").write_text(template)
    rows = BAD_ROWS[fault] if fault == "another format" else [BAD_ROWS[fault]]
    file = tmp_path / "train.jsonl"
    lines = [row if fault.startswith(("a broken", "a stray")) else json.dumps(row) for row in rows]
    file.write_text("\n".join(lines) + "\n")
    for words in (("data", "check", file), ("train", "--data", file, "--name", "a", "train.iters=1")):
        for more in ((), ("--json",)):
            ran = run(*words, "--model", base, *more)
            assert ran.code == 1, ran.out
            assert not any(form in ran.out + ran.err for piece in pieces() for form in (piece, json.dumps(piece)[1:-1]))
