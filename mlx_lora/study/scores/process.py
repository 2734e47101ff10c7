"""A process that answers lines of JSON within a time, or is killed with all that it started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import weakref
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

MOST_ANSWER = 1 << 16


class Asked:
    """`process` reads requests from its standard input, and answers in the descriptor `answers`.

    It is alone in its session, and ends with this object.
    """

    def __init__(self, process: subprocess.Popen[bytes], answers: int):
        self.process, self._answers = process, answers
        self.close = weakref.finalize(self, _end, process)

    def ask(self, request: dict[str, str], seconds: float) -> dict[str, Any]:
        """Its answer, after which it can be asked again. Raises TimeoutError and EOFError, after which it can't."""
        assert self.process.stdin is not None
        try:
            with suppress(BrokenPipeError):  # it has ended, as its answer will tell
                self.process.stdin.write(json.dumps(request).encode() + b"\n")
                self.process.stdin.flush()
        except BaseException:
            self.close()
            raise
        return self.hear(seconds)

    def hear(self, seconds: float) -> dict[str, Any]:
        """Its next answer. Raises as `ask`."""
        try:
            return self._received(seconds)
        except BaseException:  # an answer that comes later would be taken for the next one's
            self.close()
            raise

    def _received(self, seconds: float) -> dict[str, Any]:
        content, deadline = b"", time.monotonic() + seconds
        while not content.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not wait([self._answers], left):
                raise TimeoutError
            piece = os.read(self._answers, MOST_ANSWER)
            if not piece or len(content) > MOST_ANSWER:
                raise EOFError
            content += piece
        try:
            found = json.loads(content)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise EOFError
        return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its group, and take back its pipes."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError, ValueError):  # what was still to be written has no reader
            if pipe is not None:
                pipe.close()
