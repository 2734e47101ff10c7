"""`generate` and `chat` from the command line: empty and long prompts, system lines, leaving."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.cli.conftest import Ran
from tests.conftest import write_model

Run = Callable[..., Ran]


@pytest.mark.parametrize(("prompt", "piped"), [("", ""), (" \n\t", ""), ("-", ""), ("-", "\n")])
def test_an_empty_prompt_is_refused(
    run: Run, tiny_path: Path, prompt: str, piped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(piped))
    ran = run("generate", "--model", tiny_path, "--prompt", prompt)
    assert ran.code == 1 and ran.out == ""
    assert "error: the prompt is empty" in ran.err and "--prompt - to read it from stdin" in ran.err


def test_a_system_line_is_part_of_the_prompt(run: Run, tiny_path: Path) -> None:
    """As in the rows of an adapter that was trained with one."""
    words = ["generate", "--model", tiny_path, "--prompt", "hi", "--max-tokens", 2, "--json"]
    bare, led = run(*words).json, run(*words, "--system", "be brief").json
    assert led["prompt_tokens"] - bare["prompt_tokens"] == len("be brief") + 3  # <|system|> … <|end|> newline
    ran = run(*words, "--system", "be brief", "--raw")
    assert ran.code == 1 and "no system message" in ran.err and "leave --system out" in ran.err


def test_chat_takes_a_system_line(run: Run, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "talk.jsonl"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/set max_tokens 2\nhi\n/save {file}\nexit\nnever\n"))
    assert run("chat", "--model", tiny_path, "--system", "be brief").code == 0
    assert '{"role": "system", "content": "be brief"}' in file.read_text() and "never" not in file.read_text()


def test_an_adapter_of_single_questions_says_so_in_chat(
    trained: Ran, run: Run, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From training's rows through the manifest to the chat's first line."""
    monkeypatch.setattr("sys.stdin", io.StringIO("/bye\n"))
    ran = run("chat", "--model", tiny_path, "--adapter", "mine")
    assert ran.code == 0 and "mine was trained on single questions" in ran.err and "/history on" in ran.err


def test_a_prompt_over_the_context_is_refused_and_one_close_to_it_warned_about(run: Run, tiny_path: Path) -> None:
    words = ["generate", "--model", tiny_path, "--raw", "--max-tokens", 5]
    over = run(*words, "--prompt", "x" * 513)
    assert over.code == 1 and over.out == ""
    assert "the prompt has 513 tokens, this model's context is 512" in over.err and "a shorter prompt" in over.err
    near = run(*words, "--prompt", "x" * 510)
    assert near.code == 0 and "has room for 3 tokens of an answer" in near.err
    assert "warning" not in run(*words, "--prompt", "x" * 508).err


def test_a_long_prompt_shows_progress(run: Run, tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_lora.ui.SLOW", 0)
    monkeypatch.setattr("mlx_lora.serve.prefill.MOST_ON_CPU", 64)
    ran = run("generate", "--model", tiny_path, "--raw", "--prompt", "x" * 300, "--max-tokens", 1)
    assert "reading the prompt 0/300" in ran.err


@pytest.mark.real
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_inside_a_long_prompt_stops_within_two_seconds(
    home: Path, tmp_path: Path, number: int, code: int
) -> None:
    """In one pass over 2,048 of 12,000 tokens, which nothing interrupts, it took many. Seconds are of the processor:
    other work on this machine doesn't count."""
    model = write_model(
        tmp_path / "model", hidden_size=256, num_hidden_layers=12, intermediate_size=1024, num_attention_heads=8,
        max_position_embeddings=16384,
    )  # fmt: skip
    words = ["generate", "--model", str(model), "--raw", "--prompt", "x" * 12_000]
    with subprocess.Popen(
        [sys.executable, "-m", "mlx_lora", *words], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"MLX_LORA_HOME": str(home)},
    ) as process:  # fmt: skip
        assert process.stderr is not None
        assert any(line.startswith("reading the prompt") for line in process.stderr)
        before = psutil.Process(process.pid).cpu_times()
        process.send_signal(number)
        _, status, after = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == code
    assert after.ru_utime + after.ru_stime - before.user - before.system < 2
