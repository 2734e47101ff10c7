"""Who may come in: the Host and Origin of a request, and its API key.

A web page that somebody has open can send requests to this machine. Its browser says in `Origin` where the page is
from, and a name that an attacker's name server suddenly gives this machine's address (DNS rebinding) stands in `Host`.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_lora import ui
from mlx_lora.errors import MlxLoraError
from mlx_lora.serve.openai.errors import ApiError

KEY_VARIABLE = "MLX_LORA_API_KEY"
# What needs no key: the page, which asks for it, and whether the server works.
OPEN = {"/", "/health"}
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(?::[0-9]{1,5})?")


@dataclass(frozen=True)
class Access:
    """`hosts` and `origins` are allowed beside this machine's own; without a `key` everybody who gets here is served.

    `loopback`: the server listens to this machine alone.
    """

    loopback: bool = True
    key: str | None = None
    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()

    def refusal(self, headers: Mapping[bytes, list[bytes]], path: str) -> ApiError | None:
        """Why a request isn't served, or None. `headers` are all values of each lower-case name."""
        hosts = headers.get(b"host", [])
        if len(hosts) != 1 or not self.knows_host(hosts[0].decode("latin-1")):
            return ApiError(403, "host_not_allowed", "the Host header names another machine; --allow-host allows it")
        for origin in headers.get(b"origin", []):
            if not self.knows_origin(origin.decode("latin-1"), hosts[0].decode("latin-1")):
                return ApiError(403, "origin_not_allowed", "pages of this origin may not ask; --allow-origin lets them")
        if self.key is not None and path not in OPEN and not self._has_key(headers.get(b"authorization", [])):
            return ApiError(401, "invalid_api_key", "an API key is needed, as `Authorization: Bearer KEY`")
        return None

    def knows_host(self, host: str) -> bool:
        """Whether a Host header is this machine: an address can't have been made up by a name server, a name can."""
        found = HOST.fullmatch(host)
        if found is None:
            return False
        name = found[1].strip("[]").lower()
        if name == "localhost" or name in self.hosts:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self.loopback

    def knows_origin(self, origin: str, host: str) -> bool:
        return origin in self.origins or origin in (f"http://{host}", f"https://{host}")

    def _has_key(self, values: list[bytes]) -> bool:
        assert self.key is not None
        given = values[0] if len(values) == 1 else b""
        kind, _, key = given.partition(b" ")
        same = hmac.compare_digest(key.strip(), self.key.encode())  # takes as long for any key
        return same and kind.lower() == b"bearer"


def read_key(file: Path | None) -> str | None:
    """The API key: what a file holds, or the environment's; None where there is neither.

    Raises MlxLoraError for one that can't be read or used.
    """
    where = KEY_VARIABLE if file is None else str(file)
    try:
        key = os.environ.get(KEY_VARIABLE) if file is None else file.read_text(encoding="utf-8").strip()
        if file is not None and file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
            ui.warning(f"others on this machine can read {file}; chmod 600 makes it yours alone")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise MlxLoraError(f"the API key can't be read: {where}: {reason}") from None
    if key is None:
        return None
    if not re.fullmatch(r"[!-~]{8,}", key):
        raise MlxLoraError(
            f"the API key in {where} can't be used", hint="it has 8 characters or more, of ASCII and without spaces"
        )
    return key
