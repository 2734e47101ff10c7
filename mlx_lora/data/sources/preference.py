"""`{"prompt", "rejected", "chosen"?}`: rated answers, for preference training.

Training on examples leaves these rows out, so that no rejected answer is ever learned.
"""

from __future__ import annotations

from typing import Any

KEYS = {"prompt", "chosen", "rejected"}


def matches(row: dict[str, Any]) -> bool:
    """Whether a row is one, and nothing else."""
    return "rejected" in row and "prompt" in row and KEYS.issuperset(row)
