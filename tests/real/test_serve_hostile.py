"""What takes long to refuse: floods of large bodies, schemas that explode, a template that loops, many slow readers."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from mlx_lora.serve.http.bounds import Bounds
from tests.conftest import write_model
from tests.serve.http.conftest import NO_END, Running, error_of, running
from tests.serve.test_service import save_adapter

pytestmark = pytest.mark.real
CHAT = "/v1/chat/completions"
BOUNDS = Bounds(stall_seconds=2, header_seconds=3, body_seconds=3, connections=64)


@pytest.fixture
def server(home: Path, tiny_path: Path) -> Iterator[Running]:
    save_adapter(home / "adapters/one", tiny_path, 1)
    with running(tiny_path, bounds=BOUNDS, rows=8, waiting=16) as found:
        yield found
        assert found.chat("one", max_tokens=3).status_code == 200


def at_once(count: int, ask: Any) -> list[Any]:
    results: list[Any] = [None] * count

    def run(index: int) -> None:
        results[index] = ask(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_bodies_of_fifty_megabytes_are_refused_and_take_no_memory(server: Running) -> None:
    large = b'{"model": "one", "messages": [{"role": "user", "content": "' + b"x" * (50 << 20) + b'"}]}'
    process, peak, end = psutil.Process(), [0], threading.Event()

    def look() -> None:
        while not end.wait(0.01):
            peak[0] = max(peak[0], process.memory_info().rss)

    def ask(index: int) -> bytes:
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
            how = f"Content-Length: {len(large)}" if index % 2 else "Transfer-Encoding: chunked"
            client.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n{how}\r\n\r\n".encode())
            try:
                for start in range(0, len(large), 1 << 16):
                    client.sendall(
                        large[start : start + (1 << 16)] if index % 2 else b"10000\r\n" + bytes(1 << 16) + b"\r\n"
                    )
            except OSError:  # the server reads no more
                pass
            return client.recv(12)

    before = process.memory_info().rss
    looking = threading.Thread(target=look)
    looking.start()
    statuses = at_once(12, ask)
    end.set()
    looking.join()
    assert statuses == [b"HTTP/1.1 413"] * 12
    # those that say their length aren't read at all, the others up to the limit, by pieces that are joined once
    assert peak[0] - before < 6 * 3 * BOUNDS.body_bytes, "bodies are read beyond their limit"


SCHEMAS: dict[str, Any] = {
    "deep": None,
    "wide": {"type": "object", "properties": {f"key{index}": {"type": "string"} for index in range(20_000)}},
    "an endless reference": {"$ref": "#"},
    "a reference to elsewhere": {"$ref": "https://evil.example/schema.json"},
    "a reference to a file": {"$ref": "file:///etc/passwd"},
    "doubling": {
        "$ref": "#/$defs/a0",
        "$defs": {f"a{index}": {"allOf": [{"$ref": f"#/$defs/a{index + 1}"}] * 2} for index in range(40)}
        | {"a40": {"type": "string"}},
    },
    "a pattern that doubles": {"type": "string", "pattern": "^(((((a{1,99}){1,99}){1,99}){1,99}){1,99})$"},
    "many items": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
    "long": {"type": "string", "minLength": 10**9},
    "a large enumeration": {"enum": [f"word {index}" for index in range(50_000)]},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_that_explode_are_refused_soon_and_hold_up_nobody(server: Running, name: str) -> None:
    schema = SCHEMAS[name]
    if name == "deep":
        schema = {"type": "string"}
        for _ in range(25):
            schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    answered: list[float] = []

    def ask(index: int) -> httpx.Response:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
        start = time.monotonic()
        if index:
            time.sleep(0.2)
            found = server.chat("one", max_tokens=2)
            answered.append(time.monotonic() - start)
            return found
        return server.chat("one", max_tokens=3, response_format=form)

    start = time.monotonic()
    bomb, other = at_once(2, ask)
    assert bomb.status_code in (200, 400), bomb.text
    if bomb.status_code == 400:
        error_of(bomb)
    assert other.status_code == 200
    assert time.monotonic() - start < 20


def test_a_template_that_loops_is_refused_and_the_server_goes_on(home: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "loops")
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (model / "chat_template.jinja").write_text(loop + "{{ messages[0].content }}")
    with running(model) as server:
        start = time.monotonic()
        status, _ = error_of(server.chat("loops"))
        assert status == 400 and time.monotonic() - start < 60
        answer = server.client.post("/v1/completions", json={"model": "loops", "prompt": "x", "max_tokens": 2})
        assert answer.status_code == 200
    shutil.rmtree(model)


def test_many_slow_readers_hold_up_nobody(server: Running) -> None:
    body = {
        "model": "one", "messages": [{"role": "user", "content": "x"}], "max_tokens": 400, "stream": True, "n": 2,
        "logprobs": True, "top_logprobs": 20, **NO_END,
    }  # fmt: skip
    content = json.dumps(body).encode()
    sent = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content
    readers = [socket.socket() for _ in range(8)]
    try:
        for reader in readers:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            reader.connect(("127.0.0.1", server.port))
            reader.sendall(sent)
        start = time.monotonic()
        while server.chat("one", max_tokens=3).status_code == 429:
            assert time.monotonic() - start < 30
        scheduler = server.service.scheduler
        while (status := scheduler.status()).running or status.waiting:
            assert time.monotonic() - start < 60, "rows of readers that don't read go on"
            time.sleep(0.05)
    finally:
        for reader in readers:
            reader.close()


def test_idle_connections_end_and_leave_room(server: Running) -> None:
    held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(BOUNDS.connections + 20)]
    start = time.monotonic()
    try:
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{server.port}/health", trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert time.monotonic() - start < 20
            time.sleep(0.1)
    finally:
        for connection in held:
            connection.close()
