"""One module per format: `matches(row)` says whether a row has its shape, `parse(row)` makes an Example of it.

`data.columns` brings rows with other names into these shapes.

Order matters for `detect`: the most specific shape first.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from mlx_lora.data.sources import alpaca, completions, messages, sharegpt, text

FORMATS: dict[str, ModuleType] = {
    "messages": messages,
    "sharegpt": sharegpt,
    "completions": completions,
    "alpaca": alpaca,
    "text": text,
}


def detect(row: dict[str, Any]) -> str | None:
    """The name of the first format whose shape `row` has, or None."""
    return next((name for name, module in FORMATS.items() if module.matches(row)), None)
