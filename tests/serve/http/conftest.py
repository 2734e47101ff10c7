"""A server on the tiny base with two adapters, in a thread of the tests' process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlx_lora.errors import Stopped
from mlx_lora.serve.http.access import Access
from mlx_lora.serve.http.bounds import Bounds
from mlx_lora.serve.http.server import Server, bound
from mlx_lora.serve.scheduler import Limits
from mlx_lora.serve.service import Service, open_service
from tests.serve.test_service import save_adapter

# The token that ends an answer never comes.
NO_END: dict[str, Any] = {"logit_bias": {"256": -100}}


@dataclass
class Running:
    """A server that runs. `client` sends requests to it."""

    server: Server
    service: Service
    port: int
    client: httpx.Client

    def chat(self, model: str = "tiny", text: str = "say 3 twice", **fields: Any) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        return self.client.post("/v1/chat/completions", json={"model": model, "messages": messages, **fields})

    def streaming(self, model: str = "tiny", *, max_tokens: int = 400) -> Any:
        """A stream that isn't read yet, as a context manager."""
        body = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": max_tokens, **NO_END}
        fields = {"stream": True, "stream_options": {"include_usage": True}}
        return self.client.stream("POST", "/v1/chat/completions", json=body | fields)


def chunks(response: httpx.Response) -> Iterator[Any]:
    """The objects of a stream of server-sent events; asserts that it ends as it should."""
    done = False
    for line in response.iter_lines():
        if not line:
            continue
        assert line.startswith("data: ") and not done, line
        done = line == "data: [DONE]"
        if not done:
            yield json.loads(line.removeprefix("data: "))
    assert done


def error_of(response: httpx.Response) -> tuple[int, str]:
    """The status and code of an answer that is an error in OpenAI's form."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"], error
    return response.status_code, error["code"]


def wait_for(condition: Callable[[], bool], *, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it didn't happen"
        time.sleep(0.005)


@contextmanager
def held(service: Service) -> Iterator[Callable[[], None]]:
    """The generating thread does nothing until the block ends, or calls what it gets."""
    begun, end = threading.Event(), threading.Event()

    def hold(worker: object) -> None:
        begun.set()
        end.wait(30)

    def ask() -> None:
        with suppress(Stopped):  # where the thread is given up meanwhile
            service.scheduler.ask(hold)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        assert begun.wait(20)
        yield end.set
    finally:
        end.set()
        thread.join(20)


@contextmanager
def asking(*asked: Callable[[], Any]) -> Iterator[list[Any]]:
    """Requests that are sent at once, in threads; the results are there after the block, in order."""
    results: list[Any] = [None] * len(asked)

    def ask(index: int) -> None:
        results[index] = asked[index]()

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(asked))]
    for thread in threads:
        thread.start()
    yield results
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def running(
    model: Path, *, access: Access | None = None, bounds: Bounds | None = None, **limits: int
) -> Iterator[Running]:
    """Serve a base."""
    ready = threading.Event()
    with bound("127.0.0.1", 0) as listening, open_service(str(model), limits=Limits(**limits)) as service:
        server = Server(service, listening, access=access, bounds=bounds, on_ready=ready.set)
        thread = threading.Thread(target=server.serve_until_stopped)
        thread.start()
        assert ready.wait(20)
        port = listening.getsockname()[1]
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
                yield Running(server, service, port, client)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture(scope="session")
def shared_home(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> Path:
    home = tmp_path_factory.mktemp("serving") / "home"
    for seed, name in enumerate(("one", "two"), start=1):
        save_adapter(home / "adapters" / name, tiny_path, seed)
    return home


@pytest.fixture(autouse=True)
def home(shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One home for all these tests, so that they may share a server."""
    monkeypatch.setenv("MLX_LORA_HOME", str(shared_home))
    return shared_home


@pytest.fixture(scope="session")
def shared_server(tiny_path: Path) -> Iterator[Running]:
    with running(tiny_path, bounds=Bounds(body_bytes=200_000, stall_seconds=0.5, connections=20)) as found:
        yield found


@pytest.fixture
def server(shared_server: Running) -> Running:
    return shared_server
