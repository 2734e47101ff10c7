"""The page as the server gives it, and what the list of models tells it beside OpenAI's fields."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from pathlib import Path

import mlx_lora
from tests.serve.http.conftest import Running

PAGE = Path(mlx_lora.__file__).parent / "serve" / "page" / "index.html"


def test_the_page_comes_with_a_policy_that_runs_its_own_script_alone(server: Running) -> None:
    response = server.client.get("/")
    assert response.status_code == 200 and response.content == PAGE.read_bytes()
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    for kind in ("style", "script"):
        text = response.text.split(f"<{kind}>")[1].split(f"</{kind}>")[0]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{kind}-src"] == f"'sha256-{digest}'"


def test_an_adapter_of_single_questions_says_so(server: Running, home: Path) -> None:
    path = home / "adapters" / "single"
    shutil.copytree(home / "adapters" / "two", path)
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        file = {"path": "train.jsonl", "sha256": "0" * 64, "rows": 1, "tokens": 4, "answers": 1}
        (path / "manifest.json").write_text(json.dumps(manifest | {"data": [file]}))
        assert server.client.get("/v1/models/single").json()["single_questions"] is True
        assert server.client.get("/v1/models/two").json()["single_questions"] is False
        assert "single_questions" not in server.client.get("/v1/models/tiny").json()
    finally:
        shutil.rmtree(path)
