"""When the generating thread dies, hangs, has no memory, or is told to end: everybody hears of it."""

from __future__ import annotations

import re
import resource
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.errors import MlxLoraError
from mlx_lora.machine import limits
from mlx_lora.serve.http import page, server, watch
from mlx_lora.serve.http.access import KEY_VARIABLE
from mlx_lora.serve.http.bounds import Bounds
from mlx_lora.serve.status import Limits
from mlx_lora.serve.worker import Worker
from tests.serve.http.conftest import NO_END, Running, asking, chunks, error_of, held, running, wait_for

ENDLESS: dict[str, Any] = {"max_tokens": 450, **NO_END}


def test_a_dead_thread_is_told_to_every_client_and_by_health(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise SystemExit("killed on purpose")

    with running(tiny_path, rows=1) as server, server.streaming("one") as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        asked = [partial(server.chat, name, **ENDLESS) for name in ("one", "two", "tiny")]
        with asking(*asked) as answers:
            wait_for(lambda: server.client.get("/health").json()["waiting"] == 3)
            start = time.monotonic()
            monkeypatch.setattr(Worker, "turn", killed)
        assert time.monotonic() - start < 5
        assert [error_of(answer) for answer in answers] == [(503, "stopped")] * 3
        assert [line for line in lines if line][-1].startswith('data: {"error": {"message": "the thread that generates')
        health = server.client.get("/health")
        assert health.status_code == 503 and health.json()["reason"] == "the thread that generates has ended"
        refused = server.chat()
        assert error_of(refused) == (503, "stopped") and refused.headers["retry-after"] == "5"
        assert "mlx_lora_generating 0" in server.client.get("/metrics").text
        assert server.client.get("/v1/models").status_code == 200


def test_a_thread_that_hangs_is_told_and_may_come_back(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "TIMES_SLOWEST", 0)
    monkeypatch.setattr(watch, "LOOK", 0.05)
    with running(tiny_path, bounds=Bounds(stuck_seconds=0.3)) as server:
        with held(server.service):
            with asking(partial(server.chat, "one"), server.chat) as answers:
                pass
            assert [error_of(answer) for answer in answers] == [(503, "stopped")] * 2
            assert "hasn't moved for" in answers[0].text
            health = server.client.get("/health")
            assert health.status_code == 503 and health.json()["status"] == "failed"
            assert error_of(server.chat()) == (503, "stopped")
            start = time.monotonic()
            unload = server.client.post("/v1/unload_lora_adapter", json={"lora_name": "two"})
            assert error_of(unload) == (503, "stopped") and time.monotonic() - start < 5
        wait_for(lambda: server.client.get("/health").status_code == 200)
        assert server.chat("one", max_tokens=3).status_code == 200
        assert server.service.scheduler.status().running == 0


def test_a_slow_machine_isn_t_stuck() -> None:
    status = watch.Status(alive=True, running=1, waiting=0, quiet_seconds=90, slowest_seconds=12)
    assert watch.fault(status, stuck_seconds=60) is None
    assert watch.fault(watch.Status(**{**vars(status), "slowest_seconds": 2}), stuck_seconds=60)
    assert watch.fault(watch.Status(**{**vars(status), "slowest_seconds": 1e9, "quiet_seconds": 601}), 60)


def test_without_memory_a_request_is_refused_and_others_go_on(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with server.streaming("one", max_tokens=300) as stream:
        parts = chunks(stream)
        next(parts)
        monkeypatch.setattr(limits, "free_bytes", lambda: 0)
        assert len(list(parts)) > 2
        refused = server.chat("two")
        assert error_of(refused) == (503, "no_memory") and refused.headers["retry-after"] == "5"
    monkeypatch.undo()
    assert server.client.get("/health").status_code == 200


@pytest.mark.parametrize("finish", [0.0, pytest.param(20.0, marks=pytest.mark.real)])
def test_the_end_finishes_answers_or_returns_what_there_is(
    tiny_path: Path, finish: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not finish:
        turn = Worker.turn
        monkeypatch.setattr(Worker, "turn", lambda worker: (time.sleep(0.01), turn(worker)))
    with running(tiny_path, bounds=Bounds(finish_seconds=finish)) as server:
        with server.streaming("one", max_tokens=400) as stream:
            parts = chunks(stream)
            first = next(part for part in parts if part["choices"][0]["delta"].get("content"))
            server.server.should_exit = True
            rest = list(parts)
        tokens = rest[-1]["usage"]["completion_tokens"]
        assert rest[-2]["choices"][0]["finish_reason"] == "length"
        assert tokens == 400 if finish else 1 <= tokens < 400
        assert first["id"] == rest[-1]["id"]
        wait_for(lambda: not server.service.scheduler.alive)


def test_answers_that_haven_t_begun_at_the_end_are_errors(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty answer would look like one that the model gave."""
    turn = Worker.turn
    monkeypatch.setattr(Worker, "turn", lambda worker: (time.sleep(0.01), turn(worker)))
    with running(tiny_path, bounds=Bounds(finish_seconds=0.0), rows=1) as server:
        with server.streaming("one") as stream:
            parts = chunks(stream)
            next(parts)
            asked = partial(server.chat, **ENDLESS), partial(server.chat, stream=True, **ENDLESS)
            with asking(*asked) as waiting:
                wait_for(lambda: server.client.get("/health").json()["waiting"] == 2)
                server.server.should_exit = True
            assert list(parts)
        assert [error_of(answer) for answer in waiting] == [(503, "stopped")] * 2


def test_a_key_is_needed_where_others_can_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(MlxLoraError, match="an API key is needed") as caught:
            server.access(server.address_of(host), None, [], [])
        assert KEY_VARIABLE in (caught.value.hint or "")
    assert server.access(server.address_of("localhost"), None, [], []).key is None
    file = tmp_path / "key"
    file.write_text("secret-of-mine\n")
    file.chmod(0o600)
    found = server.access("0.0.0.0", file, ["Server.Example"], ["https://page.example/"])
    assert found.key == "secret-of-mine" and not found.loopback
    assert found.knows_host("server.example:8080") and found.knows_host("192.168.1.5:8080")
    assert not found.knows_host("evil.example")
    monkeypatch.setenv(KEY_VARIABLE, "another-secret")
    assert server.access("0.0.0.0", None, [], []).key == "another-secret"
    for wrong in ("", "short", "with a space in it", "\u00fcber-secret"):
        file.write_text(wrong)
        with pytest.raises(MlxLoraError, match="can't be used") as caught:
            server.access("0.0.0.0", file, [], [])
        assert not wrong or wrong not in str(caught.value)
    with pytest.raises(MlxLoraError, match="No such file"):
        server.access("127.0.0.1", tmp_path / "absent", [], [])
    for host in ("evil.example", "", "1.2.3", "localhost:80"):
        with pytest.raises(MlxLoraError, match="is not an address"):
            server.address_of(host)
    with pytest.raises(MlxLoraError, match="is not an origin"):
        server.access("127.0.0.1", None, [], ["page.example"])


@pytest.mark.parametrize(("hard", "connections"), [(-1, 512), (4096, 512), (300, 300 - server.OTHER_FILES)])
def test_as_many_files_may_be_open_as_connections_take(
    hard: int, connections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Mac begins with 256."""
    limits_set = [(256, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits_set[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: limits_set.append(limits))
    assert server.with_files(Bounds()).connections == connections
    assert limits_set[-1] == (connections + server.OTHER_FILES, hard)

    def refused(which: int, limits: tuple[int, int]) -> None:
        raise ValueError("over the system's limit")

    limits_set[-1] = (256, hard)
    monkeypatch.setattr(resource, "setrlimit", refused)
    assert server.with_files(Bounds()).connections == 256 - server.OTHER_FILES


def test_a_full_queue_is_told_before_connections_run_out() -> None:
    limits = Limits()
    assert limits.rows + limits.waiting < Bounds().connections


def test_a_port_in_use_is_an_error_with_a_hint(shared_server: Running) -> None:
    with (
        pytest.raises(MlxLoraError, match="can't listen at .*in use") as caught,
        server.bound("127.0.0.1", shared_server.port),
    ):
        pass
    assert "--port 0" in (caught.value.hint or "")


def test_the_page_may_run_its_own_script_and_nothing_else(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "index.html"
    file.write_text("<style>b { color: red }</style><b>\u00fc</b><script>alert('\u00fc')</script>", encoding="utf-8")
    monkeypatch.setattr(page, "PAGE", file)
    response = server.client.get("/")
    policy = response.headers["content-security-policy"]
    assert response.text == file.read_text(encoding="utf-8") and "text/html" in response.headers["content-type"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert re.search(r"script-src 'sha256-T?[A-Za-z0-9+/]{43}='; ", policy + "; ") and "style-src 'sha256-" in policy
    monkeypatch.setattr(page, "PAGE", tmp_path / "absent.html")
    assert error_of(server.client.get("/")) == (404, "not_found")
