"""Where LM Studio looks for models on this machine, and where a model of ours goes there."""

from __future__ import annotations

from pathlib import Path

from mlx_lora import paths
from mlx_lora.errors import ModelError
from mlx_lora.places import layout

# LM Studio shows models as publisher/model.
PUBLISHER = "mlx-lora"


def place(name: str) -> Path:
    """The directory for a model called `name` among LM Studio's; it need not exist.

    Raises ModelError where LM Studio has no folder of models on this machine.
    """
    models = layout.lm_studio_models()
    if not models.is_dir() and not models.parent.is_dir():
        raise ModelError(
            f"LM Studio has no folder of models here; it would be {models}",
            hint="--out DIR writes elsewhere; LM Studio's My Models page shows its folder",
        )
    return models / PUBLISHER / paths.check_name(name)
