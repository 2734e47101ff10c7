"""Training runs as a user would start them, in a home of their own: the validation loss that each rate reaches."""

from __future__ import annotations

import os
import tempfile
from typing import Any


def run(model: str, data: str, settings: list[str], rates: list[float]) -> dict[str, Any]:
    """Validation loss in nats after a run at each of `rates`, and the seconds that all of them took."""
    import time

    from mlx_lora.recipe import load_recipe
    from mlx_lora.tasks.train import train_adapter

    losses, start = {}, time.perf_counter()
    with tempfile.TemporaryDirectory() as home:
        os.environ["MLX_LORA_HOME"] = home
        for rate in rates:
            given = {"model": model, "data.path": data, "name": "run"}
            recipe = load_recipe(None, [*settings, f"train.learning_rate={rate}"], settings=given)
            finished = train_adapter(recipe, force=True).finished
            losses[f"{rate:g}"] = finished.valid_loss if finished.stopped_by != "nonfinite" else None
    return {"losses": losses, "all_seconds": time.perf_counter() - start}
