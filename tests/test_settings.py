"""Names of settings: familiar ones mean one key for certain, and every key says what it takes and means."""

from __future__ import annotations

import pytest

from mlx_lora import settings
from mlx_lora.config import Recipe
from mlx_lora.errors import RecipeError
from mlx_lora.recipe import load_recipe


@pytest.mark.parametrize(
    ("override", "full"),
    [
        ("lr=1e-4", "train.learning_rate=1e-4"),
        ("learning_rate=1e-4", "train.learning_rate=1e-4"),
        ("learning-rate=1e-4", "train.learning_rate=1e-4"),
        ("rank=16", "adapter.rank=16"),
        ("r=16", "adapter.rank=16"),
        ("lora_alpha=32", "adapter.alpha=32"),
        ("epochs=3", "train.epochs=3"),
        ("num_train_epochs=3", "train.epochs=3"),
        ("iters=5", "train.iters=5"),
        ("batch_size=2", "train.batch_size=2"),
        ("bits=8", "quantize.bits=8"),
        ("seed=3", "seed=3"),
        ("train.iters=5", "train.iters=5"),
        ("adapter.rank_pattern.q_proj=2", "adapter.rank_pattern.q_proj=2"),
        ("quantize=", "quantize="),
        ("nothing_of_ours=5", "nothing_of_ours=5"),
    ],
)
def test_familiar_names_become_keys(override: str, full: str) -> None:
    assert settings.translated(override) == full


def test_familiar_names_are_those_of_keys() -> None:
    """No familiar name hides a key, all lead to keys, and a value given by either name is the same setting."""
    keys = settings.fields()
    assert set(settings.FAMILIAR.values()) <= set(keys)
    assert {key for candidates in settings.UNCERTAIN.values() for key in candidates} <= set(keys)
    words = {key.rpartition(".")[2] for key in keys}
    assert not words & (settings.FAMILIAR.keys() | settings.UNCERTAIN.keys())
    assert not settings.FAMILIAR.keys() & settings.UNCERTAIN.keys()
    assert load_recipe(None, ["lr=1e-4", "r=4"]) == load_recipe(None, ["train.learning_rate=1e-4", "adapter.rank=4"])


def test_a_name_that_may_mean_several_settings_names_them() -> None:
    with pytest.raises(RecipeError, match="'steps' isn't a setting's name here") as caught:
        settings.full_key("steps")
    assert caught.value.hint == "it may mean train.iters or train.eval_every or train.save_every"


def test_every_setting_has_a_default_its_values_and_a_meaning() -> None:
    listed = settings.settings()
    whole = Recipe().model_dump()
    for setting in listed:
        section, _, key = setting.key.rpartition(".")
        assert setting.meaning.endswith(".") and len(setting.meaning) <= 72, setting.key
        assert setting.allowed, setting.key
        if whole.get(section) is not None:
            assert setting.default == whole[section][key]
    keys = [setting.key for setting in listed]
    sections = ("quantize", "adapter", "data", "train")
    assert keys[:3] == ["model", "name", "seed"] and sections == tuple(dict.fromkeys(k.split(".")[0] for k in keys[3:]))


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("adapter.rank", "integer ≥ 1"),
        ("adapter.layers", "all | integer ≥ 1 | list of integer"),
        ("adapter.rank_pattern", "name: integer ≥ 1"),
        ("data.valid_fraction", "number ≥ 0, < 1"),
        ("data.packing", "true | false"),
        ("quantize.mode", "affine | mxfp4 | nvfp4 | mxfp8 | nf4"),
        ("train.schedule", "constant | linear | cosine"),
        ("train.grad_checkpoint", "auto | on | off"),
        ("train.max_grad_norm", "number > 0 | null"),
    ],
)
def test_allowed_values_in_words(key: str, allowed: str) -> None:
    assert {setting.key: setting.allowed for setting in settings.settings()}[key] == allowed
