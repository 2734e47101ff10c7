"""A model is found once, and what its files say is read once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_lora.config import Quantize, Recipe
from mlx_lora.models import open as opening
from mlx_lora.models.load import load_stored
from mlx_lora.models.open import OpenModel, open_model
from mlx_lora.models.shapes import describe
from mlx_lora.store import registry
from mlx_lora.tasks import train as training
from tests.conftest import questions


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a model was found, its configuration read and its tokenizer made."""
    counted = dict.fromkeys(("find_model", "read_config", "load_tokenizer"), 0)

    def counting(name: str) -> Any:
        original = getattr(opening, name)

        def call(*arguments: Any, **named: Any) -> Any:
            counted[name] += 1
            return original(*arguments, **named)

        return call

    for name in counted:
        monkeypatch.setattr(opening, name, counting(name))
    return counted


def test_one_open_model_serves_every_use(tiny_path: Path, reads: dict[str, int]) -> None:
    opened = open_model(str(tiny_path))
    assert open_model(opened) is opened and isinstance(opened, OpenModel)
    describe(opened)
    first, second = load_stored(opened), load_stored(opened, quantization=Quantize(bits=4, group_size=32))
    assert first.tokenizer is second.tokenizer is opened.tokenizer
    assert registry.open_stored(opened).config == first.config
    assert second.config["quantization"]["bits"] == 4 and "quantization" not in opened.config
    assert reads == {"find_model": 1, "read_config": 1, "load_tokenizer": 1}


def test_training_finds_its_model_once_and_makes_one_tokenizer(
    tiny_path: Path, write_rows: Any, reads: dict[str, int]
) -> None:
    settings = {"model": str(tiny_path), "name": "mine", "data": {"path": str(write_rows(questions(8)))}}
    recipe = Recipe.model_validate(settings | {"train": {"iters": 1, "batch_size": 2}})
    training.train_adapter(recipe)
    assert reads == {"find_model": 1, "read_config": 1, "load_tokenizer": 1}
