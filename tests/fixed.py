"""Settings of the training loop for tests that run it alone: numbers where a recipe has `auto`."""

from __future__ import annotations

from typing import Any

from mlx_lora.config import Train


def fixed(**settings: Any) -> Train:
    """One epoch at 2e-4, an evaluation at the end and no early stop, unless `settings` say otherwise."""
    return Train(**{"epochs": 1, "learning_rate": 2e-4, "eval_every": None, "patience": None} | settings)
