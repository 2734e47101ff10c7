"""A model is found once, and what its files say is read once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.config import Quantize, Recipe
from mlx_lora.models import open as opening
from mlx_lora.models.load import load_stored
from mlx_lora.models.open import OpenModel, open_model
from mlx_lora.models.shapes import summary
from mlx_lora.store import fingerprint, registry
from mlx_lora.tasks import train as training
from tests.conftest import questions, write_model


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
    summary(opened)
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


# Prints how often Python opens each file below the folder that the first argument names, while the rest runs.
COUNTED = """
import collections, json, pathlib, sys
counts, folder = collections.Counter(), sys.argv.pop(1)
def count(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(folder):
        counts[pathlib.Path(arguments[0]).name] += 1
sys.addaudithook(count)
try:
    {body}
finally:
    print(json.dumps(counts))
"""
ONE_LOAD = "from mlx_lora.models.load import load_stored; load_stored(sys.argv[1])"
COMMAND = "from mlx_lora.cli import main; main()"


def opens(body: str, folder: Path, *words: object) -> dict[str, int]:
    """How often a process opens each file of a model directory."""
    arguments = [sys.executable, "-c", COUNTED.format(body=body), str(folder), *map(str, words)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    counts: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return counts


@pytest.mark.real
def test_train_opens_the_files_of_its_model_as_often_as_loading_it_once_does(tmp_path: Path, write_rows: Any) -> None:
    """Apart from hashing what makes the tokenizer, for the manifest; the weights' fingerprint is known already."""
    model = write_model(tmp_path / "model", torch_dtype="float32")
    fingerprint.of_directory(model)
    words = ["train", "--model", model, "--data", write_rows(questions(8)), "--name", "mine", "train.iters=1"]
    once, trained = opens(ONE_LOAD, model, model), opens(COMMAND, model, *words)
    assert min(once["config.json"], once["tokenizer.json"], once["model.safetensors"]) > 0
    assert trained == once | {"tokenizer.json": once["tokenizer.json"] + 1}
