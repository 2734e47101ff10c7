"""Whether an adapter's files are in order, and whether it fits a base."""

from __future__ import annotations

from collections.abc import Callable

from mlx_lora.errors import AdapterError
from mlx_lora.store import registry
from mlx_lora.store.adapter import read, wrappers_for
from mlx_lora.store.base import base_for


def verify_adapter(
    adapter: str, model: str | None, *, note: Callable[[str], None] = lambda text: None
) -> tuple[int, str | None]:
    """The number of its tensors, and the base that it fits: `model`, else its own where that is found.

    `note` is told why no base could be looked at. Raises AdapterError for whatever is wrong.
    """
    stored = read(registry.find(adapter))
    try:
        opened = base_for(model, [stored])
    except AdapterError as error:
        if model is not None:
            raise
        note(f"its fit was not checked: {error.message}")
        return len(stored.arrays), None
    wrappers_for(registry.open_stored(opened, [stored]).model, stored)
    return len(stored.arrays), model or registry.base_name(opened.path)
