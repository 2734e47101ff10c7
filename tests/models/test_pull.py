"""`pull` against a hub on this machine: a small HTTP server that speaks the few calls huggingface_hub makes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mlx_lora.models.load import load
from tests.conftest import write_model

COMMIT = "a" * 40


class Hub(ThreadingHTTPServer):
    """Serves one repository from a folder; breaks off weights after `cut` bytes while it is set."""

    folder: Path
    cut: int | None = None

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.is_file())


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/someone/tiny/tree/"):
            tree = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
                for file in self.server.files()
            ]
            self._send(json.dumps(tree).encode(), {"Content-Type": "application/json"})
        elif self.path.startswith("/api/models/someone/tiny"):
            siblings = [{"rfilename": file.name, "size": file.stat().st_size} for file in self.server.files()]
            info = {"id": "someone/tiny", "modelId": "someone/tiny", "sha": COMMIT, "siblings": siblings}
            self._send(json.dumps(info).encode(), {"Content-Type": "application/json"})
        elif match := re.match(r"/someone/tiny/resolve/[^/]+/(.+)", self.path.split("?")[0]):
            self._file(self.server.folder / match[1])
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def _file(self, file: Path) -> None:
        content = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        start = int(re.findall(r"\d+", self.headers.get("Range", "bytes=0-"))[0])
        self._send(content[start:], headers, cut=self.server.cut if file.suffix == ".safetensors" else None)

    def _send(self, content: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:cut])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    server = Hub(("127.0.0.1", 0), Handler)
    server.folder = write_model(tmp_path / "remote")
    (server.folder / "modeling_evil.py").write_text("raise SystemExit")
    (server.folder / "pytorch_model.bin").write_bytes(b"pickle")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def pull(hub: Hub, home: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "hub"),
        "MLX_LORA_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mlx_lora", "pull", *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    return run


def test_a_model_is_pulled_without_code_or_pickles(
    pull: Callable[..., subprocess.CompletedProcess[str]], home: Path
) -> None:
    done = pull("someone/tiny", "--name", "mine")
    assert done.returncode == 0, done.stderr
    path = home / "models" / "mine"
    assert done.stdout.strip() == str(path)
    assert {file.name for file in path.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert load(path).tokenizer.has_chat_template
    again = pull("someone/tiny", "--name", "mine")
    assert again.returncode == 1 and "exists" in again.stderr


def test_a_pull_that_breaks_off_leaves_no_model_and_goes_on(
    pull: Callable[..., subprocess.CompletedProcess[str]], hub: Hub, home: Path
) -> None:
    hub.cut = 1000
    assert pull("someone/tiny").returncode == 1
    assert not (home / "models" / "tiny").exists()
    hub.cut = None
    assert pull("someone/tiny").returncode == 0
    load(home / "models" / "tiny")


def test_what_the_hub_does_not_have_is_one_error(pull: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = pull("someone/else")
    assert done.returncode == 1 and done.stderr.startswith("error: can't pull someone/else")
    assert "Traceback" not in done.stderr
