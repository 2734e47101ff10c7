"""The server: a socket, uvicorn on it, and an end that finishes answers or returns what there is of them."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import re
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import uvicorn

from mlx_lora import ui
from mlx_lora.errors import MlxLoraError
from mlx_lora.machine import offline
from mlx_lora.serve.http.access import KEY_VARIABLE, Access, read_key
from mlx_lora.serve.http.app import make_app
from mlx_lora.serve.http.bounds import Bounds
from mlx_lora.serve.http.protocol import within
from mlx_lora.serve.service import Service

ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Bytes that the system holds for a client that reads slowly; by itself it takes megabytes.
SEND_BUFFER = 1 << 18
# Files that are open beside connections: those of adapters, of the base, and of the workers that render templates.
OTHER_FILES = 128
# Seconds that a thread has to end what it does when the server is stopped, and that responses have to be sent then.
ENDING, SENDING = 3.0, 2


def address_of(host: str) -> str:
    """The numeric address of `--host`: names are not looked up. Raises MlxLoraError."""
    if host == "localhost":
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        raise MlxLoraError(
            f"{host!r} is not an address", hint="127.0.0.1 for this machine alone, 0.0.0.0 for its networks too"
        ) from None


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def access(address: str, key_file: Path | None, hosts: Sequence[str], origins: Sequence[str]) -> Access:
    """Who may come in at an address. Raises MlxLoraError for one that others reach, without an API key."""
    key = read_key(key_file)
    if key is None and not is_loopback(address):
        raise MlxLoraError(
            f"{address} can be reached by others, so an API key is needed",
            hint=f"set {KEY_VARIABLE}, or name a file by --api-key-file; --host 127.0.0.1 needs none",
        )
    names, pages = frozenset(host.lower() for host in hosts), frozenset(origin.rstrip("/") for origin in origins)
    if wrong := [origin for origin in pages if not ORIGIN.fullmatch(origin)]:
        raise MlxLoraError(f"{wrong[0]!r} is not an origin", hint="like https://example.com or http://localhost:3000")
    return Access(is_loopback(address), key, names, pages)


@contextmanager
def bound(address: str, port: int) -> Iterator[socket.socket]:
    """A socket at a numeric address; port 0 takes a free one. Raises MlxLoraError where that can't be had."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        try:
            with offline.may_listen(address, port):
                found.bind((address, port))
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            hint = "--port 0 takes a free one" if in_use else "--host 127.0.0.1 and a port above 1023 can be had"
            raise MlxLoraError(f"can't listen at {url(address, port)}: {error.strerror}", hint=hint) from None
        yield found


def url(address: str, port: int) -> str:
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


def with_files(bounds: Bounds) -> Bounds:
    """`bounds` whose connections this process may have open: macOS gives a process 256 files unless it asks for more.

    The limit is raised as far as that takes; where it can't be, fewer connections are taken.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = bounds.connections + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
            soft = allowed
        except (OSError, ValueError):  # a limit of the system's own
            pass
        if soft < wanted:
            connections = max(soft - OTHER_FILES, 1)
            ui.warning(f"this process may open {soft} files, which leaves {connections} connections; see ulimit -n")
            return replace(bounds, connections=connections)
    return bounds


class Server(uvicorn.Server):
    """Serves `service` on a bound socket until a signal comes, or `should_exit` is set from another thread.

    `on_ready` is called once connections are taken, `on_stop` when no more are.
    """

    def __init__(
        self,
        service: Service,
        listening: socket.socket,
        *,
        access: Access | None = None,
        bounds: Bounds | None = None,
        on_ready: Callable[[], None] = lambda: None,
        on_stop: Callable[[], None] = lambda: None,
        on_request: Callable[[str], None] = lambda line: None,
    ):
        self.service, self.bounds = service, with_files(bounds or Bounds())
        self.on_ready, self.on_stop, self._listening = on_ready, on_stop, listening
        app = make_app(service, access or Access(), self.bounds, on_request)
        super().__init__(
            uvicorn.Config(
                app, http=within(self.bounds), ws="none", lifespan="on", log_config=None, log_level="critical",
                access_log=False, server_header=False, proxy_headers=False,
                timeout_graceful_shutdown=int(self.bounds.finish_seconds + ENDING) + SENDING,
            )
        )  # fmt: skip

    def serve_until_stopped(self) -> int | None:
        """Serve, and return the signal that ended it, if one did."""
        self.run(sockets=[self._listening])
        return self._captured_signals[0] if self._captured_signals else None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals end the server in its own way; who started it decides what comes then."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self.handle_exit)
            for number in SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more, give what runs its seconds, and end the rest with what it has."""
        self.on_stop()
        ending = asyncio.get_running_loop().run_in_executor(None, self._end_answers)
        await super().shutdown(sockets)
        if not self.force_exit:
            await ending

    def _end_answers(self) -> None:
        scheduler = self.service.scheduler
        scheduler.close(finish=self.bounds.finish_seconds, timeout=ENDING)
        if scheduler.alive:
            scheduler.give_up("the server has been stopped, and the thread that generates doesn't end")
