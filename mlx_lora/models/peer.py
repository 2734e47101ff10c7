"""mlx_lm's own adapters on a model, for checking what was exported for it."""

from __future__ import annotations

from pathlib import Path

import mlx.nn as nn

from mlx_lora.errors import AdapterError
from mlx_lora.machine import allocation

with allocation.file_limits_kept():
    from mlx_lm.tuner.utils import load_adapters


def put_adapter(model: nn.Module, folder: Path) -> None:
    """Let mlx_lm load the adapter in `folder` onto the bare model, in place. Raises AdapterError where it can't."""
    try:
        load_adapters(model, str(folder))
    except Exception as error:  # whatever it raises: this adapter isn't one that mlx_lm loads
        raise AdapterError(f"mlx_lm doesn't load what was written: {type(error).__name__}: {error}") from error
    model.eval()
