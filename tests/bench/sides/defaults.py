"""One training with nothing but model, data and name, in a home of its own, judged on the test rows of its folder."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import numpy as np

RESAMPLES = 10_000


def run(model: str, data: str, settings: list[str], exact: bool) -> dict[str, Any]:
    """Losses in nats per token with loss and shares of exact answers, of the base and of the adapter.

    `gain` is how much lower the adapter's loss is, [low, high] at 95 %: rows are drawn again, in pairs (percentile
    bootstrap). `settings` are overrides; without any, all but model, data and name is the default.
    """
    from mlx_lora.cli.options import data_settings
    from mlx_lora.recipe import load_recipe
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
    finished = trained.finished
    return {
        "base_loss": base.loss,
        "loss": tuned.loss,
        "gain": _interval([[(row.loss, row.tokens) for row in result.each] for result in found]),
        "base_exact": base.exact_match,
        "exact": tuned.exact_match,
        "rows": len(trained.prepared.train),
        "steps": finished.iters,
        "epochs": finished.epochs,
        "stopped_by": finished.stopped_by,
        "parameters": finished.trainable_parameters,
        "all_seconds": finished.seconds,
    }


def _interval(rows: list[list[tuple[float, int]]]) -> list[float]:
    """The 95 % interval of (base − tuned) nats per token, over rows drawn with replacement."""
    base, tuned = (np.array(side) for side in rows)
    drawn = np.random.default_rng(0).integers(0, len(base), (RESAMPLES, len(base)))
    tokens = base[drawn, 1].sum(axis=1)
    gains = (base[drawn, 0].sum(axis=1) - tuned[drawn, 0].sum(axis=1)) / tokens
    return [float(value) for value in np.quantile(gains, [0.025, 0.975])]
