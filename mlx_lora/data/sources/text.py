"""`{"text": …}`: plain text, learned as it stands."""

from __future__ import annotations

from typing import Any

from mlx_lora.data.example import Example, string


def matches(row: dict[str, Any]) -> bool:
    return "text" in row


def parse(row: dict[str, Any]) -> Example:
    return Example(text=string(row, "text"), mask="all")
