"""Requests that are meant to do harm, or made by mistake: refused in OpenAI's form, and the server goes on."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.serve.http.access import Access
from mlx_lora.serve.http.body import parse
from mlx_lora.serve.http.bounds import Bounds
from mlx_lora.serve.openai.errors import ApiError
from tests.serve.http.conftest import NO_END, Running, error_of, running

CHAT = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def goes_on(server: Running) -> Iterator[None]:
    yield
    assert server.client.get("/health").status_code == 200


@pytest.fixture(autouse=True, scope="module")
def answers_at_the_end(shared_server: Running) -> Iterator[None]:
    yield
    assert shared_server.chat(max_tokens=2).status_code == 200


def raw(server: Running, sent: bytes, *, seconds: float = 5.0) -> bytes:
    """What comes back for these bytes until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        connection.sendall(sent)
        answer = b""
        try:
            while received := connection.recv(65536):
                answer += received
        except ConnectionResetError:
            pass
        return answer


def head(length: int | str, *more: str) -> bytes:
    lines = [f"POST {CHAT} HTTP/1.1", "Host: localhost", f"Content-Length: {length}", *more]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.1.7", "", "[::2]",
     "127.0.0.1@evil.example", "0.0.0.0", "localhost:80:80", "[::1", "::1"],
)  # fmt: skip
def test_a_foreign_host_is_refused(server: Running, host: str) -> None:
    assert error_of(server.client.get("/v1/models", headers={"Host": host})) == (403, "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9", "127.0.0.1", "127.8.8.8:80", "[::1]:80"])
def test_this_machine_s_names_are_served(server: Running, host: str) -> None:
    assert server.client.get("/v1/models", headers={"Host": host}).status_code == 200


def test_no_host_and_two_hosts_are_refused(server: Running) -> None:
    assert b" 403 " in raw(server, b"GET /health HTTP/1.0\r\n\r\n")
    assert b" 400 " in raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "", "http://localhost:1", "https://127.0.0.1"])
def test_a_foreign_origin_is_refused(server: Running, origin: str) -> None:
    for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/"), ("OPTIONS", CHAT)):
        refused = server.client.request(
            method, path, headers={"Origin": origin, "Access-Control-Request-Method": "POST"}
        )
        assert error_of(refused) == (403, "origin_not_allowed")
        assert not [name for name in refused.headers if name.startswith("access-control")]


def test_the_page_s_own_origin_is_served_and_an_allowed_one_may_read(server: Running, tiny_path: Path) -> None:
    own = {"Origin": f"http://127.0.0.1:{server.port}"}
    assert server.client.get("/v1/models", headers=own).status_code == 200
    page = "https://page.example"
    with running(tiny_path, access=Access(key="a-long-key", origins=frozenset({page}))) as other:
        asks = {"Origin": page, "Access-Control-Request-Method": "POST"}
        before = other.client.options(CHAT, headers=asks)
        assert before.status_code == 204 and before.headers["access-control-allow-origin"] == page
        assert before.headers["access-control-allow-headers"] == "authorization, *"
        after = other.client.get("/v1/models", headers={"Origin": page, "Authorization": "Bearer a-long-key"})
        assert after.status_code == 200 and after.headers["access-control-allow-origin"] == page
        for key in ("", "Bearer", "Bearer wrong", "Bearer a-long-ke", "Basic a-long-key", "a-long-key"):
            refused = other.client.get("/v1/models", headers={"Authorization": key})
            assert error_of(refused) == (401, "invalid_api_key") and refused.headers["www-authenticate"] == "Bearer"
        assert error_of(other.client.post(CHAT, content=b"{")) == (401, "invalid_api_key")
        assert error_of(other.client.get("/metrics"))[0] == 401
        assert other.client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "name",
    ["../adapters/one", "./one", "/etc/passwd", "~/.mlx-lora/adapters/one", "someone/some-model", "one/../two", "",
     "one\x00", "C:\\one", "file:///etc/passwd", "https://evil.example/model", ".", "..", "x" * 500, "ｏｎｅ", "tiny/"],
)  # fmt: skip
def test_no_path_and_no_repository_is_a_model(server: Running, name: str, tiny_path: Path) -> None:
    for wrong in (name, str(tiny_path), str(tiny_path.parent)):
        status, code = error_of(server.chat(wrong))
        assert (status, code) in ((404, "model_not_found"), (400, "invalid_value")), wrong
    status, _ = error_of(server.client.get(f"/v1/models/{name.encode().hex()}"))
    assert status == 404


BODIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "invalid_json"),
    "no JSON": (b"hello", "invalid_json"),
    "no object": (b"[]", "invalid_json"),
    "cut off": (b'{"model": "one"', "invalid_json"),
    "not UTF-8": (b'{"model": "\xff\xfe"}', "invalid_json"),
    "half a character": (b'{"model": "one", "messages": [{"role": "user", "content": "\\ud800"}]}', "invalid_json"),
    "NaN": (b'{"model": "one", "temperature": NaN}', "invalid_json"),
    "a long number": (b'{"model": "one", "seed": ' + b"9" * 5000 + b"}", "invalid_json"),
    "deep": (b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "invalid_json"),
    "deep and open": (b"[" * 150_000, "invalid_json"),
    "deep objects": (b'{"a":' * 100 + b"1" + b"}" * 100, "invalid_json"),
    "no messages": (b'{"model": "one"}', "missing_required_parameter"),
    "wrong types": (b'{"model": "one", "messages": "hello"}', "invalid_value"),
    "an unknown field": (b'{"model": "one", "messages": [], "lora_path": "/etc"}', "unknown_parameter"),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_can_t_be_read_are_refused(server: Running, name: str) -> None:
    body, code = BODIES[name]
    assert error_of(server.client.post(CHAT, content=body)) == (400, code)


def test_brackets_in_a_text_aren_t_depth(server: Running) -> None:
    assert server.chat(text='[{"' * 100, max_tokens=1).status_code == 200


@pytest.mark.parametrize("end", [b"", b"\\", b'"', b'"]'])
def test_texts_that_aren_t_closed_take_no_longer_than_others(end: bytes) -> None:
    """Each quote could begin a text that reaches to the end: a million of them are read once, not a million times."""
    bounds, start = Bounds(), time.monotonic()
    with pytest.raises(ApiError, match="isn't JSON"):
        parse(b'{"a": "' + b'\\"' * (1 << 20) + end, bounds)
    assert time.monotonic() - start < 2
    with pytest.raises(ApiError, match="nested more than 64"):
        parse(b'["\\\\", ' + b"[" * 64, bounds)


def test_a_large_body_is_refused_before_it_is_read(server: Running) -> None:
    whole = {"model": "one", "messages": [{"role": "user", "content": "x" * 250_000}]}
    assert error_of(server.client.post(CHAT, content=json.dumps(whole))) == (413, "body_too_large")

    def pieces() -> Iterator[bytes]:
        for _ in range(500):
            yield b"[" * 1000

    assert error_of(server.client.post(CHAT, content=pieces())) == (413, "body_too_large")
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(head(50 << 20) + b"{")
        assert connection.recv(12) == b"HTTP/1.1 413", "nobody waits for what won't come"
    zipped = server.client.post(CHAT, content=b"x", headers={"Content-Encoding": "gzip"})
    assert error_of(zipped) == (400, "encoding_not_supported")


def test_a_slow_client_is_told_and_let_go(tiny_path: Path) -> None:
    with running(tiny_path, bounds=Bounds(header_seconds=0.2, body_seconds=0.2)) as server:
        assert b" 408 " in raw(server, head(100) + b'{"model"'), "a body that doesn't come"
        assert b" 408 " in raw(server, b""), "a request that doesn't come"
        assert b" 408 " in raw(server, b"POST /v1/chat"), "headers that don't come"
        # after an answer the next request has its time too
        assert raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea").count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    "sent",
    [b"nonsense\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"GET /\xff HTTP/1.1\r\n\r\n",
     b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 700_000,
     head(5, "Content-Length: 6"), head("x"), head("-1"), head(10**30)],
)  # fmt: skip
def test_what_isn_t_http_is_refused(server: Running, sent: bytes) -> None:
    answer = raw(server, sent)
    assert answer.startswith(b"HTTP/1.1 400 ") and b'"code": "invalid_http"' in answer


def test_connections_are_counted(server: Running) -> None:
    most = server.server.bounds.connections
    held = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(most + 5)]
    try:
        answers = []
        for connection in held[-3:]:
            answers.append(connection.recv(4096))
    finally:
        for connection in held:
            connection.close()
    assert all(b" 503 " in answer and b"too_many_connections" in answer for answer in answers)
    time.sleep(0.1)


@pytest.mark.real
def test_a_whole_answer_may_be_read_slowly_but_not_never(tiny_path: Path) -> None:
    body: dict[str, Any] = {
        "model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 200, "n": 8,
        "logprobs": True, "top_logprobs": 20, **NO_END,
    }  # fmt: skip
    content = json.dumps(body).encode()
    with running(tiny_path, bounds=Bounds(header_seconds=0.4)) as server:
        for reads in (True, False):
            with socket.socket() as reader:
                reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
                reader.settimeout(20)
                reader.connect(("127.0.0.1", server.port))
                reader.sendall(head(len(content)) + content)
                got = reader.recv(4096)
                length = int(got.partition(b"content-length: ")[2].split()[0])
                assert length > 1 << 20, "more than the system holds for it"
                end = time.monotonic() + 1.2
                while time.monotonic() < end:
                    got += reader.recv(8192) if reads else b""
                    time.sleep(0.01)
                try:
                    while len(got) < length and (more := reader.recv(1 << 20)):
                        got += more
                except ConnectionResetError:
                    pass
                assert (len(got) > length) == reads


def test_a_slow_reader_is_let_go_and_holds_up_nobody(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for more than the system holds for it, and reads none."""
    body: dict[str, Any] = {
        "model": "one", "messages": [{"role": "user", "content": "x"}], "max_tokens": 400, "stream": True, "n": 4,
        "logprobs": True, "top_logprobs": 20, **NO_END,
    }  # fmt: skip
    content = json.dumps(body).encode()
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.settimeout(20)
        reader.connect(("127.0.0.1", server.port))
        reader.sendall(head(len(content)) + content)
        scheduler = server.service.scheduler
        while not scheduler.status().running:
            time.sleep(0.01)
        assert server.chat("two", max_tokens=2).status_code == 200, "others are answered meanwhile"
        end = time.monotonic() + 20
        while (status := scheduler.status()).running or status.waiting:
            assert time.monotonic() < end
            time.sleep(0.02)
        with pytest.raises(ConnectionResetError):
            while reader.recv(1 << 20):
                pass
            raise ConnectionResetError("it got all of it")


def test_answers_carry_what_keeps_browsers_from_harm(server: Running) -> None:
    for response in (server.client.get("/v1/models"), server.client.get("/nothing"), server.client.delete("/health")):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-store"
        assert "server" not in response.headers
    assert error_of(server.client.get("/nothing")) == (404, "not_found")
    refused = server.client.delete("/health")
    assert error_of(refused) == (405, "method_not_allowed") and refused.headers["allow"] == "GET"
    for path in ("/docs", "/redoc", "/openapi.json", "/v1/../etc/passwd", "/%2e%2e/etc/passwd", "/v1/models/"):
        assert error_of(server.client.get(path))[0] == 404
