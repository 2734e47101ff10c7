"""What every reader gives, and how it says that a file can't be read."""

from __future__ import annotations

import datetime
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Note = Callable[[str], None]
INSTALL = "pip install 'mlx-lora[data]'"


class Raw(NamedTuple):
    """One row as it stands in a file, or what is wrong with it. `file` is set where a folder was read."""

    line: int
    row: dict[str, Any] | None
    problem: str | None = None
    file: Path | None = None


class Unreadable(ValueError):
    """A file, or the rest of it from `line`, can't be read. The message says why."""

    def __init__(self, problem: str, line: int = 0):
        super().__init__(problem)
        self.line = line


def library(module: str) -> Any:
    """A module of the extra `data`. Raises Unreadable with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise Unreadable(f"needs the library {module.partition('.')[0]}: {INSTALL}") from None


def cell(value: Any) -> Any:
    """A table's cell as text: an empty one as "", a whole number without its point, lists and objects as they are.

    Tables write a field that one object of a list lacks as null, so fields that are null are left out of objects.
    """
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return without_null(value) if isinstance(value, dict | list | bytes) else str(value)


def without_null(value: Any) -> Any:
    """A value without the fields that are null in objects, at any depth."""
    if isinstance(value, dict):
        return {key: without_null(inner) for key, inner in value.items() if inner is not None}
    return [without_null(inner) for inner in value] if isinstance(value, list) else value
