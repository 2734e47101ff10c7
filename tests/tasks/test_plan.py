"""Planning a recipe: what it reads, what it answers for machines of every size, and suggestions that really fit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.config import Recipe
from mlx_lora.data.prepare import prepare
from mlx_lora.errors import DataError, ModelError, RecipeError, TrainingError
from mlx_lora.models.open import open_model
from mlx_lora.recipe import load_recipe
from mlx_lora.tasks.plan import Machine, guessed, plan_recipe, plan_rows, plan_shape, suggest
from mlx_lora.train.budget import learn
from tests.conftest import questions
from tests.models.test_shapes import LLAMA_65B

LLAMA_7B = LLAMA_65B | {
    "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "num_attention_heads": 32,
    "num_key_value_heads": 32, "tie_word_embeddings": False, "torch_dtype": "float16",
}  # fmt: skip


@pytest.fixture
def llama_7b(tmp_path: Path) -> Path:
    """A directory that holds a configuration and nothing else."""
    folder = tmp_path / "llama-7b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_7B))
    return folder


def recipe(model: Path | None, *overrides: str) -> Recipe:
    return load_recipe(None, overrides, settings={"model": str(model)} if model else {})


def limited(asked: Recipe, gigabytes: float) -> Recipe:
    return load_recipe(None, [f"train.memory_limit_gb={gigabytes * 1e9 / 2**30:.9f}"], settings=asked.model_dump())


@pytest.mark.parametrize(("memory_gb", "fits"), [(8, False), (16, False), (32, True), (64, True)])
def test_a_half_precision_7b_fits_the_larger_machines(memory_gb: float, fits: bool, llama_7b: Path) -> None:
    asked = recipe(llama_7b, "data.max_seq_length=513")
    made = plan_recipe(asked, memory_gb=memory_gb, gpu=True)
    assert made.fits == fits and 13.4e9 < made.parts.weights < 13.6e9
    assert made.suggestion == (None if fits else ["quantize.bits=4"])


def test_a_processor_takes_twice_the_weights_of_half_precision(llama_7b: Path) -> None:
    on_gpu, on_cpu = (plan_recipe(recipe(llama_7b), memory_gb=64, gpu=gpu) for gpu in (True, False))
    assert on_cpu.parts.weights == 2 * on_gpu.parts.weights


@pytest.mark.parametrize(
    ("limit", "overrides", "suggested"),
    [
        (20e9, ["train.grad_checkpoint=off"], ["train.grad_checkpoint=on"]),
        (8e9, [], ["quantize.bits=4"]),
        pytest.param(
            20e9, ["train.grad_checkpoint=off", "quantize.bits=8"], ["train.grad_checkpoint=on"], marks=pytest.mark.real
        ),
        (7e9, ["train.grad_checkpoint=off"], ["train.grad_checkpoint=on", "quantize.bits=4"]),
        pytest.param(7e9, ["quantize.bits=8"], ["quantize.bits=4"], marks=pytest.mark.real),
        pytest.param(
            4.5e9, ["data.too_long=split"], ["quantize.bits=4", "data.max_seq_length"], marks=pytest.mark.real
        ),
        (4.5e9, [], ["quantize.bits=4", "data.max_seq_length", "data.too_long=truncate-start"]),
        pytest.param(
            8.6e9,
            ["adapter.rank=64", "adapter.targets=all-linear"],
            ["quantize.bits=4", "adapter.layers"],
            marks=pytest.mark.real,
        ),
        (3e9, [], None),
    ],
)
def test_a_suggestion_harms_least_and_fits_when_planned_again(
    limit: float, overrides: list[str], suggested: list[str] | None
) -> None:
    asked, machine = recipe(None, "data.max_seq_length=4097", *overrides), Machine(True, int(limit))
    assert not plan_shape(LLAMA_7B, asked, None, machine).fits
    found = suggest(LLAMA_7B, asked, None, machine)
    keys = [word if word in (suggested or []) else word.partition("=")[0] for word in found or []]
    assert (keys or None) == suggested
    if found:
        again = load_recipe(None, found, settings=asked.model_dump())
        assert plan_shape(LLAMA_7B, again, None, machine).fits


def test_rows_are_read_where_they_are_and_guessed_where_not(tiny_path: Path, write_rows: Callable[..., Path]) -> None:
    file = write_rows(questions(24))
    read = plan_recipe(recipe(tiny_path, f"data.path={file}", "data.valid_fraction=0"))
    assert read.micro.width < 100 and read.micro.lines == 4 and read.micro.trained < read.micro.positions
    for path in ("nowhere.jsonl", "null"):
        absent = plan_recipe(recipe(tiny_path, f"data.path={path}", "data.max_seq_length=513"))
        assert (absent.micro.lines, absent.micro.width) == (4, 512) and absent.micro.trained == 2048
    assert guessed(recipe(tiny_path)).trained == 2047


def test_a_suggestion_for_rows_that_are_read_cuts_those(tiny_path: Path, write_rows: Callable[..., Path]) -> None:
    file = write_rows([{"text": "word " * 100}] * 8)
    asked = recipe(tiny_path, f"data.path={file}", "adapter.layers=[2]", "train.grad_checkpoint=on")
    smallest = plan_recipe(limited(asked, 1e-6)).peak_memory_bytes / 1e9
    made = plan_recipe(limited(asked, 0.8 * smallest))
    assert not made.fits and made.suggestion and any("max_seq_length" in word for word in made.suggestion)
    again = load_recipe(None, made.suggestion, settings=limited(asked, 0.8 * smallest).model_dump())
    assert plan_recipe(again).fits


def test_time_is_told_by_an_earlier_run(tiny_path: Path, write_rows: Callable[..., Path]) -> None:
    file = write_rows(questions(24))
    asked = recipe(tiny_path, f"data.path={file}", "data.valid_fraction=0", "train.epochs=3")
    first = plan_recipe(asked)
    assert first.pace_from == "products"
    learn.remember(first, first.peak_memory_bytes, 1e-3)
    positions = 24 * 24  # every row has 17 to 25 tokens
    assert plan_recipe(asked).seconds == pytest.approx(1e-3 * 3 * positions)
    without = recipe(tiny_path, "data.max_seq_length=65", "train.iters=10")
    assert plan_recipe(without).seconds == pytest.approx(1e-3 * 10 * 4 * 64)
    assert plan_recipe(recipe(tiny_path)).seconds is None, "how many rows isn't known"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "nobody"}, "not known to the installed mlx-lm"),
        ({"model_type": "llama"}, "hidden_size, num_hidden_layers"),
    ],
)
def test_what_cant_be_planned_is_an_error_with_a_hint(config: dict[str, Any], says: str, llama_7b: Path) -> None:
    (llama_7b / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=says) as caught:
        plan_recipe(recipe(llama_7b))
    assert caught.value.hint


def test_a_recipe_without_a_model_and_faulty_rows_are_errors(tiny_path: Path, write_rows: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match="which model"):
        plan_recipe(recipe(None))
    with pytest.raises(DataError):
        plan_recipe(recipe(tiny_path, f"data.path={write_rows([{'text': 3}])}"))


@pytest.mark.parametrize(
    ("name", "memory_gb", "shape"),
    [
        ("mac-8gb", 8, (2048, 6144, 28, 16)),
        ("mac-16gb", 16, (2560, 9728, 36, 32)),
        ("mac-32gb", 32, (4096, 12288, 36, 32)),
    ],
)
def test_the_recipes_for_macs_fit_them(name: str, memory_gb: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    """With the shapes of the models that their headers name: Qwen3 of 1.7, 4 and 8 billion parameters, packed."""
    hidden, inner, layers, heads = shape
    config = LLAMA_7B | {
        "model_type": "qwen3", "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 151936,
        "tie_word_embeddings": hidden < 4096, "quantization": {"group_size": 64, "bits": 4}, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = load_recipe(Path(f"recipes/{name}.yaml"), settings={"model": str(tmp_path)})
    made = plan_recipe(asked, memory_gb=memory_gb, gpu=True)
    assert made.fits and made.peak_memory_bytes > 0.15 * made.limit_bytes


def test_a_plan_that_doesn_t_fit_is_refused_with_the_way_to_go_on(
    tiny_path: Path, write_rows: Callable[..., Path]
) -> None:
    """The limit that the hint names lets the very same run fit."""
    asked = recipe(tiny_path, f"data.path={write_rows(questions(24))}", "train.memory_limit_gb=0.0001")
    opened = open_model(tiny_path)
    prepared = prepare(str(asked.data.path), asked.data, opened.tokenizer, seed=0)
    with pytest.raises(TrainingError, match="and 107 kB may be used") as refused:
        plan_rows(asked, opened, prepared)
    hint = str(refused.value.hint)
    assert "train.on_memory=warn" in hint
    (enough,) = re.findall(r"train.memory_limit_gb=([0-9.]+)", hint)
    changed = load_recipe(None, [f"train.memory_limit_gb={enough}"], settings=asked.model_dump())
    assert plan_rows(changed, opened, prepared).fits
    changed = load_recipe(None, ["train.on_memory=warn"], settings=asked.model_dump())
    overruled = plan_rows(changed, opened, prepared)
    assert overruled.overruled and not overruled.fits
