"""Runs whose adapter begins elsewhere than at random: what they ask for, what they store, and that they go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.adapters.attach import put
from mlx_lora.config import Recipe
from mlx_lora.data.prepare import prepare
from mlx_lora.errors import RecipeError
from mlx_lora.models.load import load, load_stored, ready
from mlx_lora.models.open import open_model
from mlx_lora.quant.quantize import dequantize_layer
from mlx_lora.store import adapter as store
from mlx_lora.tasks.begin import begin
from mlx_lora.tasks.train import train_adapter

from ..conftest import questions

RANK = 4
TOKENS = mx.array([[5, 17, 3, 80, 41, 2, 9]])


@pytest.fixture
def recipe(tiny_path: Path, write_rows: Callable[..., Path]) -> Callable[..., Recipe]:
    folder = write_rows(questions(12)).parent

    def make(init: str, **sections: Any) -> Recipe:
        adapter = {"rank": RANK, "alpha": 8, "init": init, "targets": "all-linear"} | sections.pop("adapter", {})
        values = {"model": str(tiny_path), "name": "mine", "data": {"path": str(folder)}, "adapter": adapter}
        return Recipe.model_validate(values | {"train": {"iters": 2, "batch_size": 4}} | sections)

    return make


@pytest.mark.parametrize(("init", "rank"), [("pissa", 2 * RANK), ("olora", 2 * RANK), ("eva", RANK), ("loftq", RANK)])
def test_a_run_is_stored_and_read_back_over_its_base(recipe: Callable[..., Recipe], init: str, rank: int) -> None:
    quantize = {"bits": 4, "group_size": 32} if init == "loftq" else None
    done = train_adapter(recipe(init, quantize=quantize))
    learned = np.array(done.loaded.model(TOKENS))
    stored = store.read(done.path)
    settings = stored.manifest.adapter
    assert settings["init"] == "default" and stored.manifest.recipe["adapter"]["init"] == init
    wrappers = store.wrappers_for(done.loaded.model, stored)
    ranks = [wrapper.rank for wrapper in wrappers.values()]
    assert sum(ranks) == rank * len(ranks) and (len(set(ranks)) > 1) == (init == "eva")
    assert {wrapper.scale for wrapper in wrappers.values()} == {2.0}
    put(done.loaded.model, wrappers)
    np.testing.assert_allclose(np.array(done.loaded.model(TOKENS)), learned, atol=0.02 * np.abs(learned).max())


def test_loftq_begins_closer_to_the_base_before_packing(recipe: Callable[..., Recipe], tiny_path: Path) -> None:
    asked = recipe("loftq", quantize={"bits": 2, "group_size": 32}, adapter={"rank": 16, "alpha": 16})
    loaded = ready(load_stored(tiny_path, quantization=asked.quantize))
    whole, packed = np.array(load(tiny_path).model(TOKENS)), np.array(loaded.model(TOKENS))
    wrappers = begin(asked, open_model(loaded.path), loaded, [])
    begun = np.array(loaded.model(TOKENS))
    assert np.linalg.norm(begun - whole) < 0.9 * np.linalg.norm(packed - whole)
    originals = dict(load_stored(tiny_path).model.named_modules())
    for path, wrapper in wrappers.items():
        lost = np.array(originals[path]["weight"]) - np.array(dequantize_layer(wrapper.base, mx.float32))
        assert np.linalg.norm(lost - np.array(wrapper.delta())) < 0.9 * np.linalg.norm(lost), path


def test_loftq_needs_a_base_that_is_packed_on_loading(recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match="this recipe packs none") as caught:
        train_adapter(recipe("loftq"))
    assert "add quantize:" in str(caught.value.hint)


def test_eva_is_the_same_for_the_same_recipe(recipe: Callable[..., Recipe], tiny_path: Path) -> None:
    asked = recipe("eva")
    begun = []
    for _ in range(2):
        loaded = load(tiny_path)
        rows = prepare(str(asked.data.path), asked.data, loaded.tokenizer, seed=asked.seed).train
        before = np.array(loaded.model(TOKENS))
        begun.append(begin(asked, open_model(loaded.path), loaded, rows))
        np.testing.assert_array_equal(loaded.model(TOKENS), before)
    for path, wrapper in begun[0].items():
        np.testing.assert_array_equal(wrapper.lora_a, begun[1][path].lora_a, err_msg=path)
    assert len({wrapper.rank for wrapper in begun[0].values()}) > 1
