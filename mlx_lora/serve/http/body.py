"""The body of a request: read in pieces up to a limit, and no deeper than a limit before anything parses it."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, NoReturn

from fastapi import Request

from mlx_lora.serve.http.bounds import Bounds
from mlx_lora.serve.openai.errors import ApiError

# A text to its end, or to the body's: every byte is looked at once, or a text that isn't closed would take hours.
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
BRACKET = re.compile(rb"[\[\]{}]")
HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")


class ClientGone(Exception):
    """The client has closed its connection, or reads so slowly that it was closed."""


async def read(request: Request, bounds: Bounds) -> bytes:
    """The whole body. Raises ApiError 413 for one that is too large, as soon as that is known, 408 for a slow one."""
    too_large = ApiError(413, "body_too_large", f"the body has more than {bounds.body_bytes:,} bytes")
    if encoding := request.headers.get("content-encoding"):
        raise ApiError(400, "encoding_not_supported", f"a body in the encoding {encoding[:40]!r} isn't read")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > bounds.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(bounds.body_seconds):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                if len(body) > bounds.body_bytes:
                    raise too_large
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(408, "timeout", f"the body didn't come within {bounds.body_seconds:g} seconds") from None


def parse(body: bytes, bounds: Bounds) -> dict[str, Any]:
    """The JSON object in a body. Raises ApiError 400 for anything else."""
    _check_depth(body, bounds.depth)
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_number)
        if HALF_CHARACTER.search(body):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        raise _invalid("the body isn't UTF-8, or has half a character") from None
    except (ValueError, RecursionError) as error:
        raise _invalid(f"the body isn't JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise _invalid("the body isn't a JSON object")
    return value


def _check_depth(body: bytes, most: int) -> None:
    depth = 0
    for bracket in BRACKET.finditer(STRING.sub(b"", body)):
        depth += 1 if bracket.group() in b"[{" else -1
        if depth > most:
            raise _invalid(f"the body's JSON is nested more than {most} deep")


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number of JSON")


def _invalid(message: str) -> ApiError:
    return ApiError(400, "invalid_json", message)
