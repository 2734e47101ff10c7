"""Errors as OpenAI's API gives them."""

from __future__ import annotations

import re
from typing import Any

from mlx_lora.errors import AdapterError, Busy, MlxLoraError, NoMemory, NotFinite, Stopped

# A path up to its last part. Directories may have spaces in their names.
FOLDERS = re.compile(r"(?<![\w.~])~?(?:/[^/:\n]+)+/(?=[^/\s])")


def without_folders(text: str) -> str:
    """A message for a client: files by their names, since where they are on this machine is nobody's business."""
    return FOLDERS.sub("", text)


class ApiError(MlxLoraError):
    """What a client is told: an HTTP status, a code for programs, a message for people, and the field at fault."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refused(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A request that can't be answered as it is, because of one of its fields."""
    return ApiError(400, code, message, param)


def api_error(error: BaseException) -> ApiError:
    """What a client is told of an error that ended its request."""
    if isinstance(error, ApiError):
        return error
    if not isinstance(error, MlxLoraError):  # its text may hold anything
        return ApiError(500, "internal_error", f"the request failed inside the server ({type(error).__name__})")
    text = without_folders(f"{error.message}; {error.hint}" if error.hint else error.message)
    if isinstance(error, Busy):
        return ApiError(429, "busy", text)
    if isinstance(error, NoMemory):
        return ApiError(503, "no_memory", text)
    if isinstance(error, Stopped):
        return ApiError(503, "stopped", text)
    if isinstance(error, NotFinite):
        return ApiError(500, "not_finite", text)
    if isinstance(error, AdapterError):
        return ApiError(404, "model_not_found", text, "model")
    return ApiError(400, "invalid_request", text)
