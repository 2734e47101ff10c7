"""The process behind `scorer`: loads the user's file, and scores a pair of texts for each line that it reads."""

from __future__ import annotations

import json
import math
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_lora.machine import offline


def serve(descriptor: int) -> None:
    """Answer each request, a line of JSON: the first names the file, the others have `wanted` and `answer`."""
    requests = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with offline.network_guard(), os.fdopen(descriptor, "wb", buffering=0) as answers:
        score: Any = None
        for line in requests:
            request, answer = json.loads(line), dict[str, Any]()
            try:
                if "file" in request:
                    score, answer = _loaded(request["file"]), {"ready": True}
                else:
                    answer = {"score": _number(score(request["wanted"], request["answer"]))}
            except BaseException as error:  # whatever that code raises, SystemExit included
                answer = {"error": _told(error)}
            answers.write(json.dumps(answer).encode() + b"\n")


def _loaded(file: str) -> Callable[[str, str], Any]:
    sys.path.insert(0, str(Path(file).parent))
    found = runpy.run_path(file, run_name="scorer").get("score")
    if not callable(found):
        raise ValueError("has no function score(wanted, answer)")
    return found  # type: ignore[no-any-return]


def _number(value: Any) -> float:
    number = float(value) if isinstance(value, bool | int | float) or hasattr(value, "__float__") else math.nan
    if not 0 <= number <= 1:
        raise ValueError(f"score() gave {str(value)[:80]!r}, a number from 0 to 1 is needed")
    return number


def _told(error: BaseException) -> str:
    """The error, and where in the file it was raised."""
    place, trace = "", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if trace.tb_frame.f_globals.get("__name__") == "scorer":
            place = f" (line {trace.tb_lineno} of {Path(name).name})"
        trace = trace.tb_next
    kind = "" if isinstance(error, ValueError) and not place else f"{type(error).__name__}: "
    return f"{kind}{str(error)[:300]}{place}"
