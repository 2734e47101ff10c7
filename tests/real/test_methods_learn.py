"""Every method learns the embedded SQL task a little: over 4 bits where its formula allows, else over plain weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_lora import paths
from mlx_lora.methods import COMBINATIONS, METHODS
from mlx_lora.recipe import parse_recipe
from mlx_lora.tasks.train import Listener, train_adapter
from mlx_lora.train.events import Evaluated

pytestmark = pytest.mark.real

SETTINGS: dict[str, dict[str, Any]] = {
    "rslora": {"method": "lora", "rslora": True},
    "gaussian": {"method": "lora", "init": "gaussian"},
    "pissa": {"method": "lora", "init": "pissa"},
    "olora": {"method": "lora", "init": "olora"},
    "eva": {"method": "lora", "init": "eva"},
    "loftq": {"method": "lora", "init": "loftq"},
}
# The rates of a method that changes little a step, or much.
RATES = {
    "full": 2e-4,
    "ia3": 2e-2,
    "vera": 1e-2,
    "bitfit": 1e-2,
    "prompt": 3e-2,
    "prefix": 1e-2,
    "qalora": 1e-2,
    "adalora": 1e-2,
}
QUANTIZED: dict[str, Any] = {"bits": 4, "group_size": 32}


@pytest.mark.parametrize("name", sorted({*METHODS, *COMBINATIONS, *SETTINGS}))
def test_the_loss_falls(name: str, home: Path) -> None:
    """Validation loss after 24 steps, which is loaded from disk and evaluated anew in `eval`'s tests."""
    recipe = parse_recipe(
        {
            "model": str(paths.bundled("data/base")),
            "name": "learns",
            "quantize": None if name == "full" else QUANTIZED,
            "adapter": {"method": name, **SETTINGS.get(name, {})},
            "data": {"path": str(paths.bundled("data/tasks/sql"))},
            "train": {"iters": 24, "batch_size": 8, "eval_every": 24, "learning_rate": RATES.get(name, 2e-3)},
        }
    )
    heard: list[Any] = []
    run = train_adapter(recipe, listener=Listener(event=heard.append))
    losses = [event.loss for event in heard if isinstance(event, Evaluated)]
    assert losses[-1] < 0.97 * losses[0], losses
    assert (run.path / "manifest.json").is_file()
