"""A config.json that mlx_lm can't make a model of, or run: the error names the setting at fault."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.rope_utils import initialize_rope

from mlx_lora.errors import ModelError
from mlx_lora.models import shapes
from mlx_lora.models.config_faults import naming_settings
from mlx_lora.models.load import load_stored
from tests.adapters.zoo import COMMON, MODELS
from tests.conftest import VOCABULARY, write_tokenizer
from tests.models.tiny.mixed import CONFIGS

MISSING = object()
ROPE = "rope_scaling"
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def without(values: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}


# What is wrong: (model of the zoo, what changes in its config.json, what the error says)
DAMAGED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a text for a size": ("llama", {"hidden_size": "64"}, 'hidden_size is "64", a whole number is needed'),
    "a fraction for a size": ("llama", {"intermediate_size": 128.5}, "intermediate_size is 128.5, a whole number"),
    "null for a size": ("qwen3", {"num_hidden_layers": None}, "num_hidden_layers is null, a whole number is needed"),
    "a list for a size": ("gemma3", {"vocab_size": [96]}, r"vocab_size is \[96\], a whole number is needed"),
    "a text for the base": ("llama", {"rope_theta": "1e4"}, 'rope_theta is "1e4", a number is needed'),
    "a text for a norm": ("gemma3", {"rms_norm_eps": "small"}, 'rms_norm_eps is "small", a number is needed'),
    "an object for a norm": ("qwen3", {"rms_norm_eps": {}}, r"rms_norm_eps is \{\}, a number is needed"),
    "no heads": ("llama", {"num_attention_heads": 0, "head_dim": None}, "num_attention_heads is 0, at least 1 is"),
    "no heads of keys": ("gemma3", {"num_key_value_heads": 0}, "num_key_value_heads is 0, at least 1 is needed"),
    "a negative size": ("qwen3", {"hidden_size": -64}, "hidden_size is -64, at least 1 is needed"),
    "heads that don't divide": (
        "llama",
        {"num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": None},
        "hidden_size is 64, which num_attention_heads, 7, doesn't divide",
    ),
    "heads of keys that don't divide": (
        "qwen3",
        {"num_key_value_heads": 3},
        "num_attention_heads is 4, which num_key_value_heads, 3, doesn't divide",
    ),
    "a size that is missing": ("llama", {"vocab_size": MISSING}, "vocab_size is missing"),
    "two that are missing": ("qwen3", {"head_dim": MISSING, "num_hidden_layers": MISSING}, "num_hidden_layers, head_d"),
    "scaling without a factor": ("llama", {ROPE: {"type": "linear"}}, f"{ROPE} has no 'factor'"),
    "scaling by a text": ("llama", {ROPE: {"type": "linear", "factor": "2"}}, f'{ROPE}.factor is "2", a number is'),
    "scaling by nothing": ("qwen3", {ROPE: {"type": "linear", "factor": 0}}, f"{ROPE}.factor is 0, more than 0 is"),
    "scaling of no known kind": ("gemma3", {ROPE: {"rope_type": "nonesuch"}}, f'{ROPE}.rope_type is "nonesuch"'),
    "scaling that is a text": ("llama", {ROPE: "linear"}, f'{ROPE} is "linear", an object is needed'),
    "llama3 without a factor": ("llama", {ROPE: without(LLAMA3, "factor")}, f"{ROPE} has no 'factor'"),
    "yarn without a factor": ("qwen3", {ROPE: without(YARN, "factor")}, f"{ROPE} has no 'factor'"),
    "yarn of a text": ("qwen3", {ROPE: YARN | {"beta_fast": "32"}}, f'{ROPE}.beta_fast is "32", a number is needed'),
    "other rows than the files": ("llama", {"vocab_size": 100}, "vocab_size is 100, which doesn't fit the files"),
    "other heads than the files": ("qwen3", {"num_attention_heads": 6}, "num_attention_heads is 6, which doesn't fit"),
    "another width than the files": ("gemma3", {"intermediate_size": 100}, "intermediate_size is 100, which doesn't"),
}  # fmt: skip


def write(path: Path, name: str, changes: dict[str, Any]) -> Path:
    """A directory with the weights of a model of the zoo, and with these changes of its config.json."""
    kind, own = MODELS[name]
    config = {"model_type": kind, **COMMON, **own, "vocab_size": VOCABULARY}
    module = import_module(f"mlx_lm.models.{kind}")
    weights = dict(tree_flatten(module.Model(module.ModelArgs.from_dict(config)).parameters()))
    path.mkdir()
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    changed = {key: value for key, value in (config | changes).items() if value is not MISSING}
    (path / "config.json").write_text(json.dumps(changed))
    write_tokenizer(path)
    return path


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_the_models_load_before_anything_is_damaged(name: str, tmp_path: Path) -> None:
    load_stored(write(tmp_path / "model", name, {}))


@pytest.mark.parametrize("case", DAMAGED)
def test_errors_of_mlx_lm_name_the_key_of_config_json(case: str, tmp_path: Path) -> None:
    name, changes, expected = DAMAGED[case]
    with pytest.raises(ModelError, match=f"config.json: .*{expected}") as caught:
        load_stored(write(tmp_path / "model", name, changes))
    assert caught.value.hint
    assert not re.search("unsupported operand|Error\\)", caught.value.message)


@pytest.mark.parametrize("case", ["no heads", "a size that is missing", "scaling without a factor"])
def test_errors_of_a_plan_name_the_key_of_config_json(case: str) -> None:
    name, changes, expected = DAMAGED[case]
    kind, own = MODELS[name]
    config = {"model_type": kind, **COMMON, **own, **changes}
    with pytest.raises(ModelError, match=f"config.json: .*{expected}"):
        shapes.network({key: value for key, value in config.items() if value is not MISSING}, gpu=False)


def test_a_setting_of_the_text_model_is_named_where_it_stands() -> None:
    config = CONFIGS["gemma3"]
    config = config | {"text_config": config["text_config"] | {"num_key_value_heads": 0}}
    with pytest.raises(ModelError, match="config.json: text_config.num_key_value_heads is 0"):
        shapes.network(config, gpu=False)


def test_what_no_setting_explains_is_told_in_the_words_and_the_line_of_mlx_lm() -> None:
    with pytest.raises(ModelError, match=r"config.json has a setting that mlx-lm can't use: .*TypeError.*`freqs = "):
        with naming_settings({"model_type": "llama"}):
            initialize_rope("8", 1e4, False, {"rope_type": "llama3", "factor": 8.0})


def test_what_was_raised_elsewhere_passes() -> None:
    with pytest.raises(RuntimeError, match="the disk is full"), naming_settings(COMMON):
        raise RuntimeError("the disk is full")
