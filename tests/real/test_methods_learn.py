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
STEPS = 16
QUANTIZED: dict[str, Any] = {"bits": 4, "group_size": 32}


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many rows of the task as the steps read, and some to validate on."""
    folder = tmp_path_factory.mktemp("sql")
    for split, most in (("train", 8 * STEPS), ("valid", 16)):
        lines = (paths.bundled("data/tasks/sql") / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{split}.jsonl").write_text("".join(lines[:most]))
    return folder


@pytest.mark.parametrize("name", sorted({*METHODS, *COMBINATIONS, *SETTINGS}))
def test_the_loss_falls(name: str, home: Path, few: Path) -> None:
    """Validation loss after some steps, by a rate that suits the method."""
    recipe = parse_recipe(
        {
            "model": str(paths.bundled("data/base")),
            "name": "learns",
            "quantize": None if name == "full" else QUANTIZED,
            "adapter": {"method": name, **SETTINGS.get(name, {})},
            "data": {"path": str(few)},
            "train": {"iters": STEPS, "batch_size": 8, "eval_every": STEPS, "learning_rate": RATES.get(name, 2e-3)},
        }
    )
    heard: list[Any] = []
    run = train_adapter(recipe, listener=Listener(event=heard.append))
    losses = [event.loss for event in heard if isinstance(event, Evaluated)]
    assert losses[-1] < 0.97 * losses[0], losses
    assert (run.path / "manifest.json").is_file()
