"""`run` from the command line: what it prints, how it ends, and that a process that is killed loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ran

Run = Callable[..., Ran]


def test_the_summary_and_the_code_tell_of_rows_that_failed(
    run: Run, tiny_path: Path, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    file, out = write_rows([{"prompt": "a"}, {"prompt": "b", "adapter": "none"}]), tmp_path / "out.jsonl"
    words = ["run", file, "--model", tiny_path, "--out", out, "--max-tokens", 3]
    ran = run(*words, "--json")
    assert ran.code == 1 and "1 of 2 rows failed" in ran.err
    kept = {"rows": 2, "failed": 1, "before": 0, "generated_tokens": 3, "out": str(out)}
    assert ran.json | kept == ran.json and ran.json["tokens_per_second"] > 0 < ran.json["seconds"]
    again = run(*words)
    assert again.code == 1 and f"error: {out} exists" in again.err and "--force" in again.err
    good = run("run", write_rows([{"prompt": "a"}]), *words[2:], "--force")
    assert good.code == 0 and "1 of 1 rows answered" in good.out
    assert run(*words[:4], "--max-tokens", 3).code == 2


@pytest.mark.real
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_process_that_is_ended_goes_on_where_it_was(
    home: Path, tiny_path: Path, tmp_path: Path, write_rows: Callable[..., Path], number: int, code: int
) -> None:
    file = write_rows([{"prompt": f"say {index}"} for index in range(60)])
    out = tmp_path / "out.jsonl"
    words = [sys.executable, "-m", "mlx_lora", "run", file, "--model", tiny_path, "--out", out, "--rows", "2"]
    environment = os.environ | {"MLX_LORA_HOME": str(home)}
    with subprocess.Popen([*map(str, words), "--max-tokens", "30"], stderr=subprocess.PIPE, env=environment) as process:
        while not out.exists() or out.read_bytes().count(b"\n") < 5:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        process.wait(20)
    assert process.returncode == code
    kept = [line for line in out.read_text().splitlines(keepends=True) if line.endswith("\n")]
    assert 5 <= len(kept) < 60
    done = subprocess.run(
        [*map(str, words), "--max-tokens", "30", "--json"], capture_output=True, text=True, env=environment, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1])["before"] == len(kept)
    lines = out.read_text().splitlines(keepends=True)
    assert [json.loads(line)["index"] for line in lines] == list(range(60)) and set(kept) <= set(lines)
