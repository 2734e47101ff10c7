"""A text with names of columns in braces, "{title}\\n{body}". Names only: no attributes, indexes or formats."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from mlx_lora.errors import nearest

PARTS = re.compile(r"(\{\{|\}\})|\{([^{}]*)\}|([{}])")
LONGEST_NAME = 40


class Template:
    """Doubled braces stand for themselves. Raises ValueError for a name that is none of `known`."""

    def __init__(self, template: str, known: Iterable[str]):
        self.parts: list[tuple[str, bool]] = []  # (text or a column's name, whether it is a name)
        known, at = [*known], 0
        for part in PARTS.finditer(template):
            doubled, name, single = part.groups()
            if single:
                raise ValueError(f"{template[:LONGEST_NAME]!r} has a single brace; a brace in the text is doubled")
            self.parts.append((template[at : part.start()] + (doubled[0] if doubled else ""), False))
            if name is not None:
                self.parts.append((_known(name, known), True))
            at = part.end()
        self.parts.append((template[at:], False))
        if not any(is_name for _, is_name in self.parts):
            _known(template, known)

    def fill(self, row: dict[str, Any]) -> str:
        """The text for a row; an empty cell is empty text. Raises ValueError for a column it lacks, and for lists."""
        made, some = [], False
        for text, is_name in self.parts:
            if is_name:
                if text not in row:
                    raise ValueError(f"no key {text!r}, which data.columns names")
                text = _text(row[text], text)
                some = some or bool(text.strip())
            made.append(text)
        if not some:
            names = ", ".join(repr(text) for text, is_name in self.parts if is_name)
            raise ValueError(f"{names} is empty")
        return "".join(made)


def _known(name: str, known: list[str]) -> str:
    if name not in known:
        short = [each for each in known if len(each) <= LONGEST_NAME]
        raise ValueError(f"no column is named {name[:LONGEST_NAME]!r}{nearest(name, short)}")
    return name


def _text(value: Any, name: str) -> str:
    if isinstance(value, dict | list):
        raise ValueError(f"{name!r} is {type(value).__name__}, not a string")
    return "" if value is None else str(value)
