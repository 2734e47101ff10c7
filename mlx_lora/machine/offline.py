"""Nothing leaves the machine: hub variables set early, and a guard on every connection.

The guard is a Python audit hook, so it sees connections made by any library in the process, not only those that
go through this package. It can't see what native code does behind Python's back (`unshare -n` in the tests does): a
host name handed straight to a socket's `connect` is looked up before the hook hears of the connection it refuses.
Nothing comes in either: a socket is bound only where `may_listen` allows it, which is for `serve` alone.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import sys
from collections.abc import Iterator
from typing import Any

from mlx_lora.errors import NetworkBlocked

OFFLINE_VARIABLES = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
QUIET_VARIABLES = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
# Each of these may ask a name server, which sees the name.
LOOK_UPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo")

_guarded = False
_listening: frozenset[tuple[str, int]] = frozenset()  # where sockets may be bound
_installed = False


def set_hub_variables(*, offline: bool = True) -> None:
    """Tell huggingface_hub and transformers to report nothing, and to stay offline unless told otherwise.

    They read these once, when imported: call this first.
    """
    os.environ.update(QUIET_VARIABLES)
    if offline:
        os.environ.update(OFFLINE_VARIABLES)


def is_local(address: Any) -> bool:
    """Whether a socket address stays on this machine: a Unix socket, or a loopback address or `localhost`."""
    if not isinstance(address, tuple):
        return True
    host = str(address[0])
    if host in ("localhost", ""):
        return True
    try:
        return ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        return False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _guarded:
        return
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address: Any = arguments[1] if len(arguments) > 1 else None
        if not is_local(address):
            raise NetworkBlocked(f"blocked a connection to {address[0]}:{address[1]}", hint="only `pull` may connect")
    elif event in LOOK_UPS and arguments[0] is not None:
        host = arguments[0][0] if isinstance(arguments[0], tuple) else _text(arguments[0])
        if not is_local((host,)):
            raise NetworkBlocked(f"blocked a name look-up of {host}", hint="only `pull` may connect")
    elif event == "socket.bind":
        bound: Any = arguments[1]
        if isinstance(bound, tuple) and bound[:2] not in _listening:
            raise NetworkBlocked(f"blocked listening at {bound[0]}:{bound[1]}", hint="only `serve` may listen")


def _text(host: str | bytes) -> str:
    return host.decode("ascii", "replace") if isinstance(host, bytes) else host


@contextlib.contextmanager
def network_guard() -> Iterator[None]:
    """Refuse every connection that isn't to this machine while the block runs. Audit hooks stay; the switch doesn't."""
    global _guarded, _installed
    if not _installed:
        sys.addaudithook(_audit)
        _installed = True
    before, _guarded = _guarded, True
    try:
        yield
    finally:
        _guarded = before


@contextlib.contextmanager
def may_listen(host: str, port: int) -> Iterator[None]:
    """Let sockets be bound to this address while the block runs, and to no other. `host` is a numeric address."""
    global _listening
    before, _listening = _listening, _listening | {(host, port)}
    try:
        yield
    finally:
        _listening = before
