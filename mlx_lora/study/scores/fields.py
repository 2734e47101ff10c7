"""JSON answers: whether they are valid, and which of the wanted fields they have.

    {"name": "Ann", "tags": ["a", 2]}     name = text Ann      tags[0] = text a      tags[1] = number 2

A field is the path to a value that holds nothing else, and matches where path, type and value are the same.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lora.study.scores.base import f1, mean

# Paths that are told of one by one, the most frequent ones first.
MOST_PATHS = 50

Path = tuple[str | int, ...]
Fields = dict[Path, tuple[str, Any]]


@dataclass(frozen=True)
class Json:
    """F1 of an answer's fields, 0 for one that isn't JSON."""

    name: str = "json"

    def of(self, wanted: str, answer: str) -> float:
        right, found = fields_of(wanted), fields_of(answer)
        if right is None:
            return float(wanted.strip() == answer.strip())
        return 0.0 if found is None else f1(_matches(right, found), len(right), len(found))

    def details(self, wanted: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
        """`valid`, `same` are shares of the answers; `precision`, `recall` count the fields of all answers together.

        `fields[path]` has how often a field is wanted and right, with [] for every place of a list.
        """
        pairs = [(fields_of(right), fields_of(answer)) for right, answer in zip(wanted, answers, strict=True)]
        known = [(right, found) for right, found in pairs if right is not None]
        right_fields = sum(_matches(right, found or {}) for right, found in known)
        asked, had = sum(len(right) for right, _ in known), sum(len(found or {}) for _, found in known)
        wanted_of, right_of = Counter[str](), Counter[str]()
        for right, found in known:
            wanted_of.update(map(_name, right))
            right_of.update(_name(path) for path, value in right.items() if (found or {}).get(path) == value)
        return {
            "valid": mean([found is not None for _, found in pairs]),
            "same": mean([right is not None and right == found for right, found in pairs]),
            "precision": right_fields / had if had else 0.0,
            "recall": right_fields / asked if asked else 0.0,
            "wanted_not_json": len(pairs) - len(known),
            "fields": {
                path: {"wanted": count, "right": right_of[path]} for path, count in wanted_of.most_common(MOST_PATHS)
            },
        }


def parsed(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for anything else, NaN and infinity included."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def fields_of(text: str) -> Fields | None:
    """The fields of a JSON text by path, each with its type and value; None where it isn't JSON."""
    try:
        pending: list[tuple[Path, Any]] = [((), parsed(text))]
    except ValueError:
        return None
    found: Fields = {}
    while pending:
        path, value = pending.pop()
        if isinstance(value, dict | list) and value:
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            pending += [((*path, key), item) for key, item in inner]
        else:
            found[path] = (_kind(value), value)
    return found


def _matches(wanted: Fields, found: Fields) -> int:
    return sum(found.get(path) == value for path, value in wanted.items())


def _kind(value: Any) -> str:
    """Types as JSON has them: 1 and 1.0 are the same number, 1 and true aren't."""
    if isinstance(value, bool) or value is None:
        return "constant"
    return "number" if isinstance(value, int | float) else type(value).__name__


def _name(path: Path) -> str:
    return "".join("[]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".") or "(value)"


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
