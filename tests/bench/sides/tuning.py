"""Full trainings at given rates, as a user would start them: losses on the validation rows and on the test rows."""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any


def run(model: str, data: str, settings: list[str], rates: list[float]) -> dict[str, Any]:
    """`valid` and `test` losses in nats by rate, None where a run has failed, and the seconds that all of them took."""
    from mlx_lora.recipe import load_recipe
    from mlx_lora.tasks.evaluate import evaluate_adapters
    from mlx_lora.tasks.train import train_adapter

    losses: dict[str, Any] = {}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as home:
        os.environ["MLX_LORA_HOME"] = home
        for rate in rates:
            given = {"model": model, "data.path": data, "name": "run"}
            recipe = load_recipe(None, [*settings, f"train.learning_rate={rate}"], settings=given)
            finished = train_adapter(recipe, force=True).finished
            if finished.stopped_by == "nonfinite":
                losses[f"{rate:g}"] = {"valid": None, "test": None}
                continue
            (_, tuned) = evaluate_adapters(model, ["run"], data, lambda stored, data=recipe.data: data).results
            losses[f"{rate:g}"] = {"valid": finished.best_valid_loss, "test": tuned.loss}
    return {"losses": losses, "all_seconds": time.perf_counter() - start}
