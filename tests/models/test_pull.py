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
from types import SimpleNamespace

import pytest

from mlx_lora.machine import offline
from mlx_lora.models import pull as pulling
from mlx_lora.models.load import load
from tests.conftest import write_model

COMMIT = "a" * 40


class Hub(ThreadingHTTPServer):
    """Serves one repository from a folder; breaks off weights after `cut` bytes while it is set."""

    folder: Path
    cut: int | None = None
    sent_weights = False

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
        self.server.sent_weights |= self.command == "GET" and file.suffix == ".safetensors"
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
    with offline.may_listen("127.0.0.1", 0):
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


@pytest.mark.real
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


@pytest.mark.real
def test_a_pull_that_breaks_off_leaves_no_model_and_goes_on(
    pull: Callable[..., subprocess.CompletedProcess[str]], hub: Hub, home: Path
) -> None:
    hub.cut = 1000
    broken = pull("someone/tiny")
    assert broken.returncode == 1 and "run it again to continue" in broken.stderr
    assert f"what came is in {home / 'models' / '.tiny.partial'}" in broken.stderr
    assert not (home / "models" / "tiny").exists()
    hub.cut = None
    assert pull("someone/tiny").returncode == 0
    load(home / "models" / "tiny")


def test_ctrl_c_says_where_what_came_is_kept(
    hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupted(repo: str, *, local_dir: Path, **rest: object) -> None:
        local_dir.mkdir()
        (local_dir / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.snapshot_download", interrupted)
    weights = SimpleNamespace(rfilename="model.safetensors", size=1)
    info = SimpleNamespace(siblings=[weights], sha=COMMIT)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: SimpleNamespace(model_info=lambda *names, **rest: info))
    with caplog.at_level("INFO", "mlx_lora"), pytest.raises(KeyboardInterrupt):
        pulling.pull("someone/tiny")
    partial = home / "models" / ".tiny.partial"
    assert caplog.messages == [f"what came is in {partial}, running it again continues"] and partial.is_dir()


def settings(file: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))

    return change


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "an unknown architecture": (settings("config.json", model_type="nonesuch"), "architecture 'nonesuch'"),
    "code": (settings("config.json", model_file="evil.py"), "asks to run code"),
    "a tokenizer of code": (
        settings("tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]}),
        "can make its tokenizer, Evil",
    ),
    "only a pickle": (lambda folder: (folder / "model.safetensors").unlink(), "has no model*.safetensors"),
}


@pytest.mark.real
@pytest.mark.parametrize("case", REFUSED)
def test_what_could_not_be_loaded_is_refused_before_its_weights_and_leaves_nothing(
    pull: Callable[..., subprocess.CompletedProcess[str]], hub: Hub, home: Path, case: str
) -> None:
    change, said = REFUSED[case]
    change(hub.folder)
    done = pull("someone/tiny")
    assert done.returncode == 1 and said in done.stderr, done.stderr
    assert not hub.sent_weights
    assert not (home / "models").exists() or not list((home / "models").iterdir())


@pytest.mark.real
def test_what_came_and_is_no_model_leaves_nothing(
    pull: Callable[..., subprocess.CompletedProcess[str]], hub: Hub, home: Path
) -> None:
    (hub.folder / "tokenizer.json").unlink()
    done = pull("someone/tiny")
    assert done.returncode == 1 and "missing a tokenizer" in done.stderr
    assert hub.sent_weights and not list((home / "models").iterdir())


@pytest.mark.real
def test_code_that_is_only_named_is_noted(
    pull: Callable[..., subprocess.CompletedProcess[str]], hub: Hub, home: Path
) -> None:
    settings("config.json", auto_map={"AutoModel": "modeling_evil.Evil"})(hub.folder)
    done = pull("someone/tiny")
    assert done.returncode == 0 and done.stderr.count("names code that comes with the model") == 1
    assert not (home / "models" / "tiny" / "modeling_evil.py").exists()


@pytest.mark.real
def test_what_the_hub_does_not_have_is_one_error(pull: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = pull("someone/else")
    assert done.returncode == 1 and done.stderr.startswith("error: can't pull someone/else")
    assert "Traceback" not in done.stderr and "what came" not in done.stderr
