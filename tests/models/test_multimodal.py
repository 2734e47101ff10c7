"""What lies beside a text model goes along where mlx_lm drops it, and mlx_lm drops it again from what is written."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora import files
from mlx_lora.errors import ModelError
from mlx_lora.models import multimodal
from mlx_lora.models.architectures import BESIDE_TEXT, BESIDE_TEXT_RENAMED
from mlx_lora.models.layers import dequantize_model
from mlx_lora.models.load import load, load_stored
from mlx_lora.models.open import weight_files
from mlx_lora.models.save import save
from mlx_lora.quant.quantize import quantize
from mlx_lora.store import fingerprint
from tests.conftest import VOCABULARY, write_model, write_tokenizer
from tests.vision import GEMMA3, QWEN35, write_gemma3

TOKENS = mx.array([[5, 9, 70, 2, 33, 11, 8]])
DENSE = {
    "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 32,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "vocab_size": VOCABULARY, "max_position_embeddings": 512,
    "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "norm_topk_prob": True, "shared_expert_intermediate_size": 32,
}  # fmt: skip
DEEPSEEK = {
    "model_type": "deepseek_v3", "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128,
    "moe_intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "routed_scaling_factor": 1.0,
    "kv_lora_rank": 32, "q_lora_rank": None, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "n_group": 1, "topk_group": 1,
    "moe_layer_freq": 1, "first_k_dense_replace": 1, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "attention_bias": False,
}  # fmt: skip
TEXTS: dict[str, dict[str, Any]] = {
    "gemma3": GEMMA3["text_config"],
    "gemma3n": {
        "model_type": "gemma3n_text", "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 128,
        "num_attention_heads": 4, "head_dim": 32, "rms_norm_eps": 1e-6, "vocab_size": VOCABULARY,
        "num_key_value_heads": 2, "num_kv_shared_layers": 1, "vocab_size_per_layer_input": VOCABULARY,
        "sliding_window": 16, "max_position_embeddings": 128, "rope_local_base_freq": 1e4, "rope_theta": 1e5,
        "final_logit_softcapping": 30.0, "layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0], "hidden_size_per_layer_input": 16,
        "altup_num_inputs": 4, "altup_coef_clip": 120.0, "altup_correct_scale": True, "altup_active_idx": 0,
        "laurel_rank": 8,
    },
    "gemma4": {
        "model_type": "gemma4_text", "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 128,
        "num_attention_heads": 4, "head_dim": 32, "global_head_dim": 32, "num_key_value_heads": 2,
        "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 1, "sliding_window": 16, "sliding_window_pattern": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "kimi_k25": DEEPSEEK,
    "kimi_vl": DEEPSEEK,
    "lfm2-vl": {
        "model_type": "lfm2", "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "norm_eps": 1e-6,
        "conv_bias": False, "conv_L_cache": 3, "block_dim": 64, "block_ff_dim": 128, "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False, "full_attn_idxs": [1],
        "rope_theta": 10000.0,
    },
    "llama4": DENSE | {
        "model_type": "llama4_text", "attention_bias": False, "attention_chunk_size": 64, "num_hidden_layers": 4,
        "interleave_moe_layer_step": 1, "intermediate_size_mlp": 128, "num_experts_per_tok": 1,
        "num_local_experts": 4, "rope_scaling": None, "use_qk_norm": True,
    },
    "minimax_m3_vl": DENSE | {
        "model_type": "minimax_m3", "dense_intermediate_size": 128, "shared_intermediate_size": 32,
        "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "mistral3": DENSE | {"model_type": "mistral"},
    "muse_glimmer": DENSE,
    "pixtral": DENSE | {"model_type": "mistral"},
    "qwen2_vl": DENSE | {"model_type": "qwen2_vl_text"},
    "qwen3_5": QWEN35["text_config"],
    "qwen3_5_moe": QWEN35["text_config"] | EXPERTS,
    "qwen3_vl": DENSE | {"model_type": "qwen3_vl_text"},
    "qwen3_vl_moe": DENSE | EXPERTS | {"model_type": "qwen3_vl_moe_text"},
}  # fmt: skip
UNTRIED = {"kimi_k3", "prism_hadamard_qwen35"}


def write(path: Path, architecture: str, prefix: str) -> Path:
    """A checkpoint with one vision tensor below `prefix`, text where published files with such names have it."""
    kind = architecture.replace("-", "_")
    config = {"model_type": architecture, "vocab_size": VOCABULARY, "text_config": dict(TEXTS[architecture])}
    config |= {"vision_config": {"model_type": kind, "hidden_size": 32}}
    module = import_module(f"mlx_lm.models.{architecture}")
    model = module.Model(module.ModelArgs.from_dict(json.loads(json.dumps(config))))
    tensors = dict(tree_flatten(model.parameters()))
    if prefix.startswith("model.") and architecture in BESIDE_TEXT_RENAMED:
        tensors = {name.replace("language_model.model.", "model.language_model."): a for name, a in tensors.items()}
        tensors = {name.replace("language_model.lm_head", "lm_head"): array for name, array in tensors.items()}
    path.mkdir(parents=True)
    tensors[f"{prefix}0.weight"] = mx.arange(6, dtype=mx.float16).reshape(2, 3)
    mx.save_safetensors(str(path / "model.safetensors"), tensors, {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    write_tokenizer(path)
    return path


def test_every_architecture_is_tried() -> None:
    assert set(TEXTS) | UNTRIED == set(BESIDE_TEXT)


@pytest.mark.parametrize(("architecture", "prefix"), [(name, prefix) for name in TEXTS for prefix in BESIDE_TEXT[name]])
def test_mlx_lm_drops_it_from_the_source_and_from_what_is_written(
    tmp_path: Path, architecture: str, prefix: str
) -> None:
    source, written = write(tmp_path / "source", architecture, prefix), tmp_path / "written"
    saved = save(load_stored(source), written)
    renamed = BESIDE_TEXT_RENAMED.get(architecture, {}).get(prefix, prefix)
    assert list(saved.extras.tensors) == [f"{renamed}0.weight"]
    assert mx.load(str(written / multimodal.VISION_FILE))[f"{renamed}0.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    before, after = (np.array(load(path).model(TOKENS)) for path in (source, written))
    np.testing.assert_array_equal(before, after)
    configs = [json.loads((path / "config.json").read_text()) for path in (source, written)]
    assert configs[0] == configs[1], "settings that mlx_lm makes up would be believed by other readers"
    again = save(load_stored(written), tmp_path / "again")
    assert list(again.extras.tensors) == [f"{renamed}0.weight"]


def test_packed_vision_keeps_its_format_whatever_the_text_is_packed_in(tmp_path: Path) -> None:
    """As mlx_vlm writes it: vision layers with scales, and one entry in config.json for all."""
    source = write_gemma3(tmp_path / "source")
    name = "vision_tower.vision_model.encoder.layers.0.mlp.fc1"
    whole = {key: array for file in weight_files(source) for key, array in mx.load(str(file)).items()}
    whole |= dict(zip((f"{name}.{part}" for part in ("weight", "scales", "biases")),
                      mx.quantize(whole[f"{name}.weight"], group_size=32, bits=8), strict=True))  # fmt: skip
    for file in weight_files(source):
        file.unlink()
    mx.save_safetensors(str(source / "model.safetensors"), whole)
    config = json.loads((source / "config.json").read_text())
    theirs = {"bits": 8, "group_size": 32, "mode": "affine"}
    (source / "config.json").write_text(json.dumps(config | {"quantization": theirs}))

    loaded = load_stored(source)
    loaded.config["quantization"] = quantize(loaded.model, {"mode": "affine", "bits": 4, "group_size": 32}).config
    save(loaded, tmp_path / "four")
    config = json.loads((tmp_path / "four" / "config.json").read_text())
    assert config["quantization"]["bits"] == 4 and config["quantization"][name] == theirs
    dequantize_model(loaded)
    save(loaded, tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["quantization"][name] == theirs
    assert config["quantization"]["language_model.model.layers.0.mlp.up_proj"] is False
    for path in ("four", "plain"):
        assert mx.isfinite(load(tmp_path / path).model(TOKENS)).all()


def test_a_packed_embedding_is_written_as_a_head_too_and_read_once(tmp_path: Path) -> None:
    """mlx_vlm gives Gemma 3 a head of its own; here the model stays what it was."""
    loaded = load_stored(write_gemma3(tmp_path / "source"))
    loaded.config["quantization"] = quantize(loaded.model, {"mode": "affine", "bits": 4, "group_size": 32}).config
    save(loaded, tmp_path / "packed")
    heads = mx.load(str(tmp_path / "packed" / multimodal.HEAD_FILE))
    assert set(heads) == {f"language_model.lm_head.{part}" for part in ("weight", "scales", "biases")}
    again = load_stored(tmp_path / "packed")
    assert "lm_head" not in again.model.language_model
    assert fingerprint.of_model(again.model) == fingerprint.of_model(loaded.model)
    assert fingerprint.of_directory(tmp_path / "packed") == fingerprint.of_model(loaded.model)


def test_a_file_of_that_name_from_elsewhere_counts(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    (path / "model.safetensors").rename(path / multimodal.VISION_FILE)
    assert fingerprint.of_directory(path) == fingerprint.of_model(load_stored(path).model)


def test_vision_that_is_not_known_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_model(tmp_path / "model", vision_config={"hidden_size": 8})
    with caplog.at_level("INFO", "mlx_lora"):
        saved = save(load_stored(path), tmp_path / "out")
    assert caplog.messages == [f"{path}: its vision part is not known here, what is written is the text model alone"]
    assert saved.extras.as_dict() == {"vision": 0, "files": [], "stale": []}
    assert "vision_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_nothing_is_held_in_memory_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_gemma3(tmp_path / "source")
    monkeypatch.setattr(files, "_CHUNK", 100)
    save(load_stored(source), tmp_path / "out")
    chunks = [
        len(chunk)
        for tensor in files.tensors(tmp_path / "out" / multimodal.VISION_FILE, ModelError)
        for chunk in files.tensor_bytes(tensor, ModelError)
    ]
    assert max(chunks) == 100
