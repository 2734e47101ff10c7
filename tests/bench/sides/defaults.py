"""One training with nothing but model, data and name, in a home of its own, judged on the test rows of its folder."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import numpy as np


def run(model: str, data: str, settings: list[str], exact: bool) -> dict[str, Any]:
    """Losses in nats per token with loss and shares of exact answers, of the base and of the adapter.

    `gain` is how much lower the adapter's loss is, [low, high] at 95 %, as a verdict has it. `settings` are overrides;
    without any, all but model, data and name is the default.
    """
    from mlx_lora.cli.options import data_settings
    from mlx_lora.recipe import load_recipe
    from mlx_lora.study.statistics import of_losses
    from mlx_lora.tasks.evaluate import evaluate_adapters
    from mlx_lora.tasks.train import train_adapter

    with tempfile.TemporaryDirectory() as home:
        os.environ["MLX_LORA_HOME"] = home
        recipe = load_recipe(None, settings, settings={"model": model, "data.path": data, "name": "run"})
        trained = train_adapter(recipe, force=True)
        found = evaluate_adapters(
            model, ["run"], data, lambda stored: data_settings(None, stored), exact=exact, max_tokens=64
        ).results
    base, tuned = found
    losses = [np.array([row.loss for row in result.each]) for result in found]
    gain = of_losses(losses[1], losses[0], np.array([row.tokens for row in base.each])).interval
    finished = trained.finished
    return {
        "base_loss": base.loss,
        "loss": tuned.loss,
        "gain": list(gain),
        "base_exact": base.exact_match,
        "exact": tuned.exact_match,
        "rows": len(trained.prepared.train),
        "steps": finished.iters,
        "epochs": finished.epochs,
        "stopped_by": finished.stopped_by,
        "parameters": finished.trainable_parameters,
        "all_seconds": finished.seconds,
    }
