"""`mlx-lora serve` as a process: what it prints, how it ends, and what it refuses before anything is loaded."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from mlx_lora.machine import offline
from tests.cli.conftest import Ran
from tests.serve.test_service import save_adapter

Run = Callable[..., Ran]


@pytest.mark.real
def test_it_says_where_it_listens_answers_and_ends_with_a_signal(tiny_path: Path, home: Path, tmp_path: Path) -> None:
    """An adapter outside of the home has the name of its directory: clients see no path."""
    save_adapter(tmp_path / "mine", tiny_path, 1)
    words = [
        "serve",
        "--model",
        str(tiny_path),
        "--adapter",
        str(tmp_path / "mine"),
        "--port",
        "0",
        "--verbose",
        "--json",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_lora", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"MLX_LORA_HOME": str(home)},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert (
            said["base"] == "tiny"
            and said["adapters"] == ["mine"]
            and re.fullmatch(r"http://127\.0\.0\.1:\d+/", said["page"])
        )
        secret = {"model": "mine", "messages": [{"role": "user", "content": "my secret"}], "max_tokens": 2}
        with httpx.Client(base_url=said["url"], trust_env=False, timeout=30) as client:
            assert client.post("/chat/completions", json=secret).status_code == 200
            assert str(tmp_path) not in client.get("/models").text
            assert client.post("/chat/completions", json=secret | {"model": "absent secret"}).status_code == 404
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 143 and out == ""
    assert "Traceback" not in err and "secret" not in err
    assert re.search(r"POST /v1/chat/completions 200 \d+\.\d\d s", err) and "ending: no more requests" in err


def test_what_can_t_be_served_is_said_before_the_base_is_loaded(
    run: Run, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLX_LORA_API_KEY", raising=False)
    base = ("serve", "--model", tiny_path)
    ran = run(*base, "--host", "0.0.0.0", "--port", 0)
    assert ran.code == 1 and "an API key is needed" in ran.err and "hint: set MLX_LORA_API_KEY" in ran.err
    with offline.may_listen("127.0.0.1", 0), socket.create_server(("127.0.0.1", 0)) as taken:
        ran = run(*base, "--port", taken.getsockname()[1])
    assert ran.code == 1 and "in use" in ran.err and "--port 0" in ran.err and "loading" not in ran.err
    assert run("serve", "--model", tiny_path / "absent", "--port", 0).code == 1
    assert run(*base, "--port", 70_000).code == 2


def test_a_missing_package_is_a_hint(run: Run, tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("mlx_lora.serve.http")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    ran = run("serve", "--model", tiny_path)
    assert ran.code == 1 and "serve needs uvicorn" in ran.err and "pip install 'mlx-lora[serve]'" in ran.err
