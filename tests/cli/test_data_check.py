"""`data check` on the command line: its keys, its exit code, and no traceback whatever the file holds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ran
from tests.conftest import questions

Run = Callable[..., Ran]
KEYS = {
    "format", "rows", "problems", "tokens", "trained_tokens", "longest", "truncated_rows", "empty_rows", "duplicates",
    "leaked_rows",
}  # fmt: skip


def test_good_rows(run: Run, write_rows: Callable[..., Path], tiny_path: Path) -> None:
    ran = run("data", "check", write_rows(questions(3)), "--model", tiny_path, "--json")
    assert ran.code == 0
    assert ran.json.keys() >= KEYS
    known = {"format": "completions", "rows": 3, "problems": [], "trained_tokens": 9, "longest": 18, "empty_rows": 0}
    assert known.items() <= ran.json.items()


def test_problems_are_listed_with_file_and_line(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"text": "a"}\n{"text": "a"\n{"prompt": "b", "completion": "c"}\n{"text": ""}\n{"text": "a"}\n')
    ran = run("data", "check", tmp_path, "--json")
    assert ran.code == 1
    assert [(problem["file"], problem["line"]) for problem in ran.json["problems"]] == [
        (str(file), n) for n in (2, 3, 4)
    ]
    assert all(problem.keys() == {"file", "line", "problem"} for problem in ran.json["problems"])
    assert (ran.json["rows"], ran.json["empty_rows"], ran.json["duplicates"], ran.json["tokens"]) == (2, 1, 1, None)


def test_settings_decide_the_counts(run: Run, write_rows: Callable[..., Path], tiny_path: Path) -> None:
    file = write_rows([*questions(1), {"prompt": "a" * 50, "completion": "b"}])
    words = ("data", "check", file, "data.max_seq_length=30", "--model", tiny_path, "--json")
    ran, cut = run(*words), run(*words, "data.too_long=truncate-start")
    assert (ran.code, len(ran.json["problems"])) == (1, 1)
    assert (cut.code, cut.json["truncated_rows"], cut.json["longest"]) == (0, 1, 30)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"", "a.jsonl: is empty"),
        ("a.jsonl", b'{"text": "\xc3\xa9\xff"}', "a.jsonl:1: is not UTF-8"),
        ("a.jsonl", b'{"text": ' + b"[" * 100000, "a.jsonl:1: not valid JSON (nested too deeply)"),
        ("a.jsonl", b'{"text": "\\udc00"}', "a.jsonl:1: holds"),
        ("a.jsonl", b'{"instruction": "a", "output": "b", "history": 5}', "a.jsonl:1: 'history'"),
        ("a.json", b'{"text": "a"}', "a.json: a .json file holds one list of rows"),
        ("a.csv", b'text\n"a\n', "a.csv:2: is not sound CSV (a quote that begins here is not closed)"),
        ("a.mp3", b"text\na\n", "not a kind of file that is read here"),
        (None, b"", "no such file or folder"),
    ],
)
def test_bad_files_end_with_1_and_say_why(
    run: Run, tmp_path: Path, name: str | None, content: bytes, said: str
) -> None:
    file = tmp_path / (name or "missing")
    if name:
        file.write_bytes(content)
    ran = run("data", "check", file)
    assert ran.code == 1
    assert said in ran.out + ran.err
    assert "unexpected" not in ran.err


def test_a_setting_that_is_unknown(run: Run, write_rows: Callable[..., Path]) -> None:
    ran = run("data", "check", write_rows(questions(1)), "data.maks=last")
    assert ran.code == 1 and "did you mean 'data.mask'?" in ran.err


def test_show_marks_what_is_learned(run: Run, write_rows: Callable[..., Path], tiny_path: Path) -> None:
    ran = run("data", "check", write_rows(questions(2)), "--model", tiny_path, "--show", "1")
    assert ran.code == 0 and "say 0 twice" in ran.out and "00" in ran.out and "say 1 twice" not in ran.out


@pytest.mark.real
def test_as_a_process(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\nbroken\n')
    words = [sys.executable, "-m", "mlx_lora", "data", "check", str(file), "--json"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report.keys() >= KEYS and [problem["line"] for problem in report["problems"]] == [2]
