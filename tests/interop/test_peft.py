"""PEFT's form of an adapter: what goes out comes back in the last bit, and what isn't understood is refused by name."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.config import Quantize
from mlx_lora.errors import AdapterError, MlxLoraError, NameTaken
from mlx_lora.interop.peft import config
from mlx_lora.interop.peft.config import read_settings
from mlx_lora.interop.peft.write import alpha_of
from mlx_lora.models.load import load_stored
from mlx_lora.models.save import save as save_model
from mlx_lora.store import adapter as store
from mlx_lora.tasks.export_adapter import export_adapter
from mlx_lora.tasks.import_adapter import import_adapter
from tests.interop.conftest import change_config, change_tensors, logits, wrappers_of

Make = Callable[..., Path]
Q = "base_model.model.model.layers.0.self_attn.q_proj"
SETTINGS: dict[str, dict[str, Any]] = {
    "attention": {"rank": 4},
    "all-linear": {"rank": 3, "alpha": 7, "targets": "all-linear"},
    "rslora": {"rank": 8, "alpha": 16, "rslora": True},
    "patterns": {"rank": 4, "rank_pattern": {"q_proj": 2, "v_proj": 8}, "alpha_pattern": {"k_proj": 3}},
    "odd patterns": {"rank": 3, "alpha": 7, "rank_pattern": {"q_proj": 5, "v_proj": 11}},
    "layers": {"rank": 4, "layers": [0, 2]},
    "embedding": {"rank": 4, "targets": ["embed_tokens", "lm_head", "v_proj"]},
    "pissa": {"rank": 4, "init": "pissa"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "dora": {"method": "dora", "rank": 4, "targets": "all-linear"},
    "vera": {"method": "vera", "rank": 8, "targets": ["q_proj", "down_proj"]},
    "ia3": {"method": "ia3"},
    "qalora": {"method": "qalora", "rank": 4, "targets": "all-linear"},
}


def out_and_in(path: Path, home: Path) -> tuple[store.StoredAdapter, store.StoredAdapter]:
    """The stored adapter `mine`, and what came back of it by way of PEFT."""
    export_adapter("mine", "peft", home / "peft", model=str(path))
    back = import_adapter(home / "peft", "back", str(path))
    return store.read(home / "adapters" / "mine"), store.read(back.path)


@pytest.mark.parametrize("case", SETTINGS)
def test_lora_comes_back_in_the_last_bit(case: str, make: Make, untied_path: Path, home: Path) -> None:
    make(untied_path, **SETTINGS[case])
    before, after = out_and_in(untied_path, home)
    assert (before.rank, before.scale) == (after.rank, after.scale)
    assert before.manifest.modules == after.manifest.modules and before.arrays.keys() == after.arrays.keys()
    for name, array in before.arrays.items():
        assert array.dtype == after.arrays[name].dtype and mx.array_equal(array, after.arrays[name]).item(), name
    assert before.manifest.base == after.manifest.base


@pytest.mark.parametrize("case", OTHERS)
def test_other_methods_come_back_with_the_same_logits(case: str, make: Make, untied_path: Path, home: Path) -> None:
    make(untied_path, **OTHERS[case])
    before, after = out_and_in(untied_path, home)
    assert before.manifest.method == after.manifest.method and before.manifest.modules == after.manifest.modules
    mine, back = (logits(untied_path, home / "adapters" / name) for name in ("mine", "back"))
    assert np.abs(mine - logits(untied_path, None)).max() > 0.1
    np.testing.assert_allclose(back, mine, rtol=1e-5, atol=1e-5)


def test_veras_own_pair_travels_with_the_adapter(make: Make, untied_path: Path, home: Path) -> None:
    make(untied_path, **OTHERS["vera"])
    export_adapter("mine", "peft", home / "peft", model=str(untied_path))
    change_tensors(home / "peft", lambda arrays: arrays.update({"base_model.vera_A": -arrays["base_model.vera_A"]}))
    back = import_adapter(home / "peft", "back", str(untied_path))
    base, mine, other = (logits(untied_path, path) for path in (None, home / "adapters" / "mine", back.path))
    assert np.abs(other - mine).max() > 0.1, "the pair of the file was drawn again from a seed"
    export_adapter("back", "peft", home / "again", model=str(untied_path))
    there, again = (mx.load(str(home / name / "adapter_model.safetensors")) for name in ("peft", "again"))
    assert there.keys() == again.keys() and all(mx.allclose(there[name], again[name]).item() for name in there)
    assert np.abs(other - base).max() > 0.1


def test_what_is_written_is_what_peft_writes(make: Make, untied_path: Path, home: Path) -> None:
    make(untied_path, rank=4, alpha=8, rank_pattern={"q_proj": 2})
    export_adapter("mine", "peft", home / "peft", model=str(untied_path))
    config = json.loads((home / "peft" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM" and config["bias"] == "none"
    assert "model.layers.0.self_attn.q_proj" in config["target_modules"] and len(config["target_modules"]) == 12
    assert config["r"] == 4 and config["rank_pattern"] == {f"model.layers.{n}.self_attn.q_proj": 2 for n in range(3)}
    # one scale for all in our files, that of the first module
    scale = config["lora_alpha"] / config["r"]
    assert all(alpha == scale * 2 for alpha in config["alpha_pattern"].values())
    tensors: Any = mx.load(str(home / "peft" / "adapter_model.safetensors"))
    assert tensors[f"{Q}.lora_A.weight"].shape == (2, 64) and tensors[f"{Q}.lora_B.weight"].shape == (64, 2)
    card = (home / "peft" / "README.md").read_text()
    assert str(home) not in card and "untied" in card


def test_alpha_gives_the_scale_and_is_whole_where_it_can_be() -> None:
    random = np.random.default_rng(0)
    for rank in (1, 2, 3, 6, 7, 8, 12, 64, 100):
        for divisor in (float(rank), math.sqrt(rank)):
            for alpha in (1, 7, 16, 33):
                assert alpha_of(alpha / divisor, divisor) == alpha and isinstance(
                    alpha_of(alpha / divisor, divisor), int
                )
            for scale in random.uniform(0.01, 50, 50):
                assert math.isclose(alpha_of(scale, divisor) / divisor, scale, rel_tol=3e-16)


MATCHES: dict[str, tuple[dict[str, Any], str, bool]] = {
    "end of a path": ({"target_modules": ["q_proj"]}, "model.layers.0.self_attn.q_proj", True),
    "not the middle of a name": ({"target_modules": ["proj"]}, "model.layers.0.self_attn.q_proj", False),
    "whole path": ({"target_modules": ["lm_head"]}, "lm_head", True),
    "whole regex": ({"target_modules": r".*\.q_proj"}, "model.layers.0.self_attn.q_proj", True),
    "no part of a regex": ({"target_modules": "q_proj"}, "model.layers.0.self_attn.q_proj", False),
    "excluded": ({"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0.*"}, "model.layers.0.a.q_proj", False),
    "excluded by end": ({"target_modules": ".*", "exclude_modules": ["q_proj"]}, "model.layers.0.a.q_proj", False),
    "layer": ({"target_modules": ["q_proj"], "layers_to_transform": [1, 2]}, "model.layers.2.a.q_proj", True),
    "other layer": ({"target_modules": ["q_proj"], "layers_to_transform": 1}, "model.layers.2.a.q_proj", False),
    "first number": ({"target_modules": ["w1"], "layers_to_transform": 0}, "model.layers.1.experts.0.w1", False),
    "pattern": (
        {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "h"}, "model.h.1.q", True,
    ),
    "other pattern": (
        {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": ["h"]}, "model.layers.1.q", False,
    ),
    "group in a pattern": (
        {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "(h|layers)"}, "model.h.1.q", True,
    ),
    "no layer": ({"target_modules": ["x"], "layers_to_transform": [0]}, "model.x", False),
    "whole path in another layer": ({"target_modules": ["a.1.q"], "layers_to_transform": [0]}, "a.1.q", True),
}  # fmt: skip


@pytest.mark.parametrize("case", MATCHES)
def test_targets_follow_pefts_rules(case: str, tmp_path: Path) -> None:
    values, path, expected = MATCHES[case]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, **values}))
    assert read_settings(tmp_path).targets(path, linear=True) is expected


def test_an_expression_that_would_take_for_ever_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "LONGEST", 0.1)
    with pytest.raises(AdapterError, match="takes too long"):
        config.fits("(?:.*a){1,30}b", "a" * 200)


def test_the_first_pattern_that_matches_wins(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"q_proj": 2, r"layers\.1\..*": 3}, "alpha_pattern": {r".*\.0\.q_proj": 5}}
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True, **patterns}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    settings = read_settings(tmp_path)
    ranks = [settings.rank_of(path) for path in ("layers.1.q_proj", "layers.1.v_proj", "layers.0.v_proj", "xq_proj")]
    assert ranks == [2, 3, 4, 4]
    assert settings.scale_of("layers.0.q_proj") == 5 / math.sqrt(2) and settings.scale_of("x") == 8 / 2


SETTINGS_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "activated": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is [1, 2]"),
    "bias": ({"bias": "lora_only"}, "bias is 'lora_only'"),
    "lora bias": ({"lora_bias": True}, "lora_bias is True"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    "loftq": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "loftq_config"),
    "replication": ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    "tokens": ({"trainable_token_indices": [5]}, "trainable_token_indices"),
    "modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
    "unknown": ({"quantum_rank": 3}, "quantum_rank is 3: this setting isn't supported"),
    "type": ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported, only LORA, VERA, IA3"),
    "rank": ({"r": 0}, "r is 0, not a whole number above 0"),
    "alpha": ({"lora_alpha": "16"}, "lora_alpha is '16'"),
    "pattern": ({"rank_pattern": {"(": 2}}, "rank_pattern: '(' is not a regular expression"),
    "regex": ({"target_modules": "*"}, "target_modules: '*' is not a regular expression"),
    "flags": ({"rank_pattern": {"(?i)q_proj": 4}}, "rank_pattern: '(?i)q_proj' is not a regular expression"),
    "large": ({"lora_alpha": 10**400}, "lora_alpha is 1"),
    "two methods": ({"use_dora": True, "use_qalora": True}, "use_dora and use_qalora are both on"),
    "other rank": (
        {"rank_pattern": {"q_proj": 8}},
        f"{Q[17:]}.lora_A has shape (4, 64), and rank and base need (8, 64)",
    ),
    "not named": ({"target_modules": ["k_proj"]}, f"{Q[17:]} has tensors, and the configuration doesn't name it"),
    "not whole": ({"target_modules": "all-linear"}, "mlp.gate_proj is a target of the configuration"),
    "dora": ({"use_dora": True}, f"{Q[17:]}.lora_magnitude_vector is missing"),
}


@pytest.mark.parametrize("case", SETTINGS_REFUSED)
def test_settings_are_refused_by_name(case: str, exported: Path, tiny_path: Path, home: Path) -> None:
    values, message = SETTINGS_REFUSED[case]
    refused(exported, tiny_path, home, message, lambda folder: change_config(folder, **values))


def without(name: str) -> Callable[[dict[str, mx.array]], Any]:
    return lambda arrays: arrays.pop(name)


def with_(name: str, array: mx.array) -> Callable[[dict[str, mx.array]], Any]:
    return lambda arrays: arrays.update({name: array})


TENSORS_REFUSED: dict[str, tuple[Callable[[dict[str, mx.array]], Any], str]] = {
    "half": (without(f"{Q}.lora_B.weight"), f"{Q[17:]}.lora_B is missing"),
    "module": (lambda arrays: [arrays.pop(f"{Q}.lora_{x}.weight") for x in "AB"], "q_proj is a target of the config"),
    "unknown": (with_(f"{Q}.lora_C.weight", mx.zeros(3)), f"{Q[17:]}.lora_C.weight is no tensor of a lora adapter"),
    "bias": (with_(f"{Q}.lora_B.bias", mx.zeros(64)), "lora_B.bias is no tensor"),
    "shape": (with_(f"{Q}.lora_B.weight", mx.zeros((65, 4))), "lora_B has shape (65, 4)"),
    "nan": (with_(f"{Q}.lora_B.weight", mx.full((64, 4), math.nan)), f"{Q}.lora_B.weight holds NaN or infinity"),
    "integers": (with_(f"{Q}.lora_B.weight", mx.zeros((64, 4), mx.int32)), "of type int32, not a float"),
    "no layer": (with_(Q.replace("layers.0", "layers.7") + ".lora_A.weight", mx.zeros((4, 64))), "has no such layer"),
    "vision": (
        with_("base_model.model.vision.q_proj.lora_A.weight", mx.zeros((4, 64))),
        "vision.q_proj: the base has no",
    ),
    "tied head": (
        with_("base_model.model.lm_head.lora_A.weight", mx.zeros((4, 64))),
        "lm_head: the base's head is its",
    ),
    "other table": (with_("base_model.model.model.embed_tokens.weight", mx.zeros((262, 64))), "trained or of another"),
    "larger table": (with_("base_model.model.model.embed_tokens.weight", mx.zeros((300, 64))), "a weight (300, 64) of"),
    "experts": (
        with_("base_model.model.model.layers.0.mlp.experts.lora_A.weight", mx.zeros((4, 64))),
        "no such experts",
    ),
}


@pytest.mark.parametrize("case", TENSORS_REFUSED)
def test_tensors_are_refused_by_name(case: str, exported: Path, tiny_path: Path, home: Path) -> None:
    change, message = TENSORS_REFUSED[case]
    refused(exported, tiny_path, home, message, lambda folder: change_tensors(folder, change))


def refused(exported: Path, path: Path, home: Path, message: str, damage: Callable[[Path], Any]) -> None:
    folder = home / "peft"
    shutil.copytree(exported, folder)
    damage(folder)
    with pytest.raises(AdapterError) as caught:
        import_adapter(folder, "back", str(path))
    assert message in caught.value.message
    assert not (home / "adapters").exists(), "something was written"


FILES_REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickle": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        "no adapter_model.safetensors",
    ),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json"),
    "no format": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "has no peft_type"),
    "no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "not readable as JSON"),
    "cut": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\0" * 40),
        "not a readable safetensors",
    ),
    "empty": (lambda folder: change_tensors(folder, lambda arrays: arrays.clear()), "it holds no tensors"),
}


@pytest.mark.parametrize("case", FILES_REFUSED)
def test_files_are_refused(case: str, exported: Path, tiny_path: Path, home: Path) -> None:
    damage, message = FILES_REFUSED[case]
    refused(exported, tiny_path, home, message, damage)


def test_a_copy_of_the_bases_embedding_is_no_adapter(exported: Path, tiny_path: Path, home: Path) -> None:
    weights: Any = mx.load(str(tiny_path / "model.safetensors"))
    copy = {"base_model.model.model.embed_tokens.weight": weights["model.embed_tokens.weight"]}

    def damage(folder: Path) -> None:
        change_tensors(folder, lambda arrays: (arrays.clear(), arrays.update(copy)))
        change_config(folder, target_modules=None)

    refused(exported, tiny_path, home, "the file has no tensors of an adapter", damage)


def test_a_copy_of_the_bases_embedding_beside_an_adapter_is_left_out(
    exported: Path, tiny_path: Path, home: Path
) -> None:
    folder = home / "peft"
    shutil.copytree(exported, folder)
    weights: Any = mx.load(str(tiny_path / "model.safetensors"))
    copy = weights["model.embed_tokens.weight"].astype(mx.bfloat16)
    copies = {f"base_model.model.{name}.weight": copy for name in ("model.embed_tokens", "lm_head")}
    change_tensors(folder, lambda arrays: arrays.update(copies))
    assert import_adapter(folder, "back", str(tiny_path)).modules == 12


def test_qalora_over_other_groups_is_stored_as_the_lora_that_it_equals(
    make: Make, untied_path: Path, home: Path, tmp_path: Path
) -> None:
    make(untied_path, **OTHERS["qalora"])  # groups of 32 inputs
    export_adapter("mine", "peft", home / "peft", model=str(untied_path))
    loaded = load_stored(untied_path, quantization=Quantize(bits=8, group_size=64))
    save_model(loaded, tmp_path / "packed")
    back = import_adapter(home / "peft", "back", str(tmp_path / "packed"))
    assert back.method == "lora"
    mine = wrappers_of(untied_path, home / "adapters" / "mine")
    for path, wrapper in wrappers_of(tmp_path / "packed", back.path).items():
        np.testing.assert_allclose(wrapper.delta(), mine[path].delta(), rtol=1e-4, atol=1e-6)


def test_an_export_says_that_the_base_was_packed(
    make: Make, untied_path: Path, home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_model(load_stored(untied_path, quantization=Quantize(bits=8, group_size=64)), tmp_path / "packed")
    make(tmp_path / "packed", rank=4)
    with caplog.at_level("INFO"):
        export_adapter("mine", "peft", home / "peft", model=str(tmp_path / "packed"))
    assert "trained over packed weights (8 bits)" in caplog.text
    assert "quantized to 8 bits" in (home / "peft" / "README.md").read_text()


def test_regrouping_keeps_the_update(make: Make, untied_path: Path, home: Path, tmp_path: Path) -> None:
    """A base in smaller groups than PEFT's: still QA-LoRA, each of whose groups is a part of one of PEFT's."""
    loaded = load_stored(untied_path, quantization=Quantize(bits=8, group_size=64))
    save_model(loaded, tmp_path / "packed")
    make(tmp_path / "packed", **OTHERS["qalora"])
    export_adapter("mine", "peft", home / "peft", model=str(tmp_path / "packed"))
    back = import_adapter(home / "peft", "back", str(untied_path))
    assert back.method == "qalora"
    mine = wrappers_of(tmp_path / "packed", home / "adapters" / "mine")
    for path, wrapper in wrappers_of(untied_path, back.path).items():
        np.testing.assert_allclose(wrapper.delta(), mine[path].delta(), rtol=1e-4, atol=1e-6)


EXPORTS_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "tied embedding": ({"targets": ["embed_tokens"]}, "model.embed_tokens: this base's head is the embedding too"),
    "bitfit": ({"method": "bitfit", "targets": ["q_proj"]}, "has no form in other formats"),
    "glora": ({"method": "glora"}, "GLoRA"),
    "prefix": ({"method": "prefix"}, "has no form in other formats"),
}


@pytest.mark.parametrize("case", EXPORTS_REFUSED)
def test_what_peft_cant_say_is_refused_before_anything_is_written(
    case: str, make: Make, tiny_path: Path, home: Path
) -> None:
    settings, message = EXPORTS_REFUSED[case]
    try:
        make(tiny_path, **settings)
    except MlxLoraError:
        pytest.fail("the adapter itself can't be made")
    with pytest.raises(AdapterError) as caught:
        export_adapter("mine", "peft", home / "out", model=str(tiny_path))
    assert message in caught.value.message and not (home / "out").exists()


def test_nothing_is_overwritten_without_force(make: Make, tiny_path: Path, home: Path) -> None:
    make(tiny_path, rank=4)
    export_adapter("mine", "peft", home / "peft", model=str(tiny_path))
    with pytest.raises(NameTaken):
        export_adapter("mine", "peft", home / "peft", model=str(tiny_path))
    with pytest.raises(NameTaken):
        import_adapter(home / "peft", "mine", str(tiny_path))
    export_adapter("mine", "peft", home / "peft", model=str(tiny_path), force=True)
    assert import_adapter(home / "peft", "mine", str(tiny_path), force=True).modules == 12
