"""What clients get from a server: models, answers whole and streamed, adapters that come and go, counts."""

from __future__ import annotations

import json
import re
import shutil
import socket
from functools import partial
from pathlib import Path

import httpx
import pytest

from mlx_lora.serve.http.answering import as_bytes
from tests.serve.http.conftest import NO_END, Running, asking, chunks, error_of, held, running, wait_for
from tests.serve.test_service import save_adapter

MESSAGES = [{"role": "user", "content": "say 3 twice"}]


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def alone(server: Running, name: str | None, tokens: int) -> str:
    service = server.service
    return service.ask(service.prompt(MESSAGES, name), name, max_tokens=tokens).whole()


def test_models_are_the_base_and_its_adapters(server: Running) -> None:
    listed = server.client.get("/v1/models").json()
    found = [(entry["id"], entry["parent"], entry["root"], entry["object"]) for entry in listed["data"]]
    assert found == [("tiny", None, "tiny", "model"), ("one", "tiny", "one", "model"), ("two", "tiny", "two", "model")]
    assert server.client.get("/v1/models/two").json() == listed["data"][2]
    assert server.client.get("/v1/models/tiny").json() == listed["data"][0]
    assert error_of(server.client.get("/v1/models/three")) == (404, "model_not_found")


def test_each_request_is_answered_by_the_model_that_it_names(server: Running) -> None:
    names = ["tiny", "one", "two", "one", "tiny", "two"]
    expected = {name: alone(server, None if name == "tiny" else name, 12) for name in set(names)}
    assert len(set(expected.values())) == 3
    with asking(*(partial(server.chat, name, max_tokens=12, temperature=0) for name in names)) as found:
        pass
    assert [text_of(response) for response in found] == [expected[name] for name in names]


def test_a_stream_joined_is_the_whole(server: Running) -> None:
    whole = text_of(server.chat("one", max_tokens=20, temperature=0))
    fields = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 20, "temperature": 0, "n": 2}
    with server.client.stream(
        "POST", "/v1/chat/completions", json={"model": "one", "messages": MESSAGES, **fields}
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        parts = list(chunks(response))
    texts = {0: "", 1: ""}
    for part in parts:
        for choice in part["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
    assert texts == {0: whole, 1: whole} and len(parts) > 10
    assert parts[-1]["usage"]["completion_tokens"] == 40


def test_nothing_in_a_stream_ends_its_line() -> None:
    text = "a\u2028b\u0085c\x0bd\x1ce\ud800"
    sent = as_bytes({"text": text, "logprob": float("-inf")})
    assert len(sent.decode().splitlines()) == 1 and json.loads(sent) == {"text": text, "logprob": None}


def test_a_text_is_continued(server: Running) -> None:
    response = server.client.post("/v1/completions", json={"model": "one", "prompt": "say", "max_tokens": 5})
    assert response.json()["object"] == "text_completion" and response.json()["usage"]["completion_tokens"] <= 5


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_its_rows_with_it(server: Running, stream: bool) -> None:
    before = server.service.scheduler.status().generated_tokens
    body = {"model": "one", "messages": MESSAGES, "max_tokens": 450, "stream": stream, "n": 2, **NO_END}
    if stream:
        with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            server.client.post("/v1/chat/completions", json=body, timeout=httpx.Timeout(20, read=0.1))
    wait_for(lambda: server.service.scheduler.status().running == 0, seconds=3)
    status = server.service.scheduler.status()
    assert status.waiting == 0 and status.generated_tokens - before < 2 * 450
    assert server.chat(max_tokens=2).status_code == 200


def test_adapters_appear_are_replaced_and_go_while_the_server_runs(
    server: Running, home: Path, tiny_path: Path
) -> None:
    assert error_of(server.chat("new")) == (404, "model_not_found")
    save_adapter(home / "adapters/new", tiny_path, 7)
    first = text_of(server.chat("new", max_tokens=8, temperature=0))
    assert first == alone(server, "new", 8)
    shutil.rmtree(home / "adapters/new")
    save_adapter(home / "adapters/new", tiny_path, 8)
    assert text_of(server.chat("new", max_tokens=8, temperature=0)) == alone(server, "new", 8) != first
    shutil.rmtree(home / "adapters/new")
    assert error_of(server.chat("new")) == (404, "model_not_found")
    assert "new" not in server.client.get("/v1/models").text


@pytest.mark.parametrize("file", ["adapters.safetensors", "manifest.json"])
def test_a_damaged_adapter_is_told_without_where_it_lies(
    server: Running, home: Path, tiny_path: Path, file: str
) -> None:
    save_adapter(home / "adapters/damaged", tiny_path, 7)
    (home / "adapters/damaged" / file).write_bytes(b"{ nothing of use")
    load = server.client.post("/v1/load_lora_adapter", json={"lora_name": "damaged"})
    for told in (server.chat("damaged"), load):
        assert error_of(told) == (404, "model_not_found") and str(home.parent) not in told.text
    assert file in server.chat("damaged").text
    shutil.rmtree(home / "adapters/damaged")


def test_an_adapter_is_brought_into_memory_and_let_go_by_its_name_alone(server: Running) -> None:
    def post(route: str, **body: object) -> httpx.Response:
        return server.client.post(f"/v1/{route}_lora_adapter", json=body)

    assert post("load", lora_name="two").text == "Success: LoRA adapter 'two' added successfully."
    assert "two" in server.service.scheduler.status().adapters
    assert post("unload", lora_name="two", lora_int_id=1).status_code == 200
    assert "two" not in server.service.scheduler.status().adapters
    assert post("load", lora_name="two", lora_path="two").status_code == 200
    for name in ("three", "", None, 7, ["two"], "../adapters/two", "/etc", "someone/some-model"):
        assert error_of(post("load", lora_name=name)) == (404, "model_not_found")
        assert error_of(post("unload", lora_name=name)) == (404, "model_not_found")
    assert error_of(post("load", lora_name="two", lora_path="/tmp/two")) == (400, "invalid_value")


def test_too_many_requests_are_told_when_to_ask_again(tiny_path: Path) -> None:
    with running(tiny_path, rows=1, waiting=1) as server:
        asked = partial(server.chat, max_tokens=3), partial(server.chat, "one", max_tokens=3)
        with held(server.service) as release, asking(*asked) as answers:
            wait_for(lambda: server.client.get("/health").json()["waiting"] == 2)
            busy = server.chat()
            release()
        assert error_of(busy) == (429, "busy") and int(busy.headers["retry-after"]) >= 1
        assert busy.json()["error"]["type"] == "rate_limit_error"
        assert error_of(server.chat(n=3)) == (429, "busy")
        assert [answer.status_code for answer in answers] == [200, 200]


def test_metrics_count_what_was_done(server: Running) -> None:
    def value(name: str) -> float:
        text = server.client.get("/metrics").text
        found = re.search(rf"^mlx_lora_{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    counted = 'requests_total{route="/v1/chat/completions",status="200"}'
    before = value(counted), value("prompt_tokens_total"), value("prompt_cache_hits_total")
    usage = [server.chat("one", max_tokens=3, temperature=0).json()["usage"] for _ in range(2)]
    wait_for(lambda: value(counted) == before[0] + 2)  # counted after it was sent
    assert value("prompt_tokens_total") == before[1] + sum(one["prompt_tokens"] for one in usage)
    assert value("prompt_cache_hits_total") >= before[2] + 1
    assert value("active_memory_bytes") > 0 and value("adapter_bytes") > 0 and value("generating") == 1
    gone = 'requests_total{route="/v1/chat/completions",status="%d"}'
    before = value(gone % 0), value(gone % 500)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
    wait_for(lambda: value(gone % 0) == before[0] + 1)
    assert value(gone % 500) == before[1], "a client that leaves is no fault of the server"
    text = server.client.get("/metrics").text
    assert all(re.fullmatch(r"# (HELP|TYPE) .+|[a-z_]+(\{.*\})? -?[0-9.]+", line) for line in text.splitlines())
    server.client.get("/someone's/secret")
    assert "secret" not in server.client.get("/metrics").text
