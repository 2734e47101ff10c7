"""The guard lets nothing leave this machine, and nothing on it is hindered."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_lora.errors import NetworkBlocked
from mlx_lora.machine import offline

AWAY = "192.0.2.1"  # reserved for documentation: nobody answers


def tcp(address: tuple[str, int]) -> None:
    with socket.socket() as connection:
        connection.settimeout(1)
        connection.connect(address)


def udp(address: tuple[str, int]) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as connection:
        connection.sendto(b"x", address)


def message(address: tuple[str, int]) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as connection:
        connection.sendmsg([b"x"], [], 0, address)


def quiet(address: tuple[str, int]) -> None:
    with socket.socket() as connection:
        connection.connect_ex(address)


LEAVING: dict[str, Callable[[], object]] = {
    "connect": lambda: tcp((AWAY, 443)),
    "connect_ex": lambda: quiet((AWAY, 443)),
    "create_connection": lambda: socket.create_connection((AWAY, 443), timeout=1),
    "sendto": lambda: udp((AWAY, 53)),
    "sendmsg": lambda: message((AWAY, 53)),
    "getaddrinfo": lambda: socket.getaddrinfo("example.com", 443),
    "getaddrinfo of bytes": lambda: socket.getaddrinfo(b"example.com", 443),
    "gethostbyname": lambda: socket.gethostbyname("example.com"),
    "gethostbyname_ex": lambda: socket.gethostbyname_ex("example.com"),
    "gethostbyaddr": lambda: socket.gethostbyaddr(AWAY),
    "getnameinfo": lambda: socket.getnameinfo((AWAY, 443), 0),
}


@pytest.mark.parametrize("way", LEAVING)
def test_every_way_out_is_refused(way: str) -> None:
    with offline.network_guard(), pytest.raises(NetworkBlocked, match="blocked a") as caught:
        LEAVING[way]()
    assert "pull" in (caught.value.hint or "")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_this_machine_can_be_reached(host: str) -> None:
    listening = offline.may_listen("127.0.0.1", 0)
    with offline.network_guard(), listening, socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection((host, port), timeout=1).close()
        udp(("127.0.0.1", port))
        assert socket.getaddrinfo(host, port) and socket.getaddrinfo(None, port)


def test_sockets_listen_where_they_may_and_nowhere_else() -> None:
    def listen(host: str, port: int = 0, family: int = socket.AF_INET) -> None:
        with socket.socket(family) as server:
            server.bind((host, port))

    with offline.network_guard():
        for host in ("127.0.0.1", "0.0.0.0", "", "localhost"):
            with pytest.raises(NetworkBlocked, match="blocked listening at"):
                listen(host)
        with offline.may_listen("127.0.0.1", 0):
            listen("127.0.0.1")
            with pytest.raises(NetworkBlocked):
                listen("0.0.0.0")
        with pytest.raises(NetworkBlocked) as caught:
            listen("127.0.0.1")
        assert "serve" in (caught.value.hint or "")


def test_unix_sockets_and_pairs_can_be_used(tmp_path: Path) -> None:
    with offline.network_guard(), socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(os.path.relpath(tmp_path / "s"))
        server.listen()
        client.connect(os.path.relpath(tmp_path / "s"))
        one, other = socket.socketpair()
        with one, other:
            one.sendmsg([b"x"])
            assert other.recv(1) == b"x"


@pytest.mark.parametrize(
    ("address", "local"),
    [
        (("127.0.0.1", 1), True), (("127.8.9.1", 1), True), (("::1", 1, 0, 0), True), (("localhost", 1), True),
        ("/run/socket", True), (b"\0abstract", True), (None, True), (("10.0.0.1", 1), False), (("0.0.0.0", 1), False),
        (("::ffff:8.8.8.8", 1, 0, 0), False), (("fe80::1%eth0", 1, 0, 2), False), (("localhost.evil.com", 1), False),
    ],
)  # fmt: skip
def test_which_addresses_are_local(address: object, local: bool) -> None:
    assert offline.is_local(address) == local


def test_the_guard_ends_with_its_block_and_nests() -> None:
    before = offline._guarded
    with offline.network_guard():
        with offline.network_guard():
            pass
        assert offline._guarded
    assert offline._guarded == before


def test_hub_variables_reach_the_hub_library_when_set_before_it() -> None:
    code = (
        "from mlx_lora.machine import offline; offline.set_hub_variables()\n"
        "from huggingface_hub import constants; print(constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_TELEMETRY)"
    )
    environment = {key: value for key, value in os.environ.items() if key not in offline.OFFLINE_VARIABLES}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["True", "True"]
