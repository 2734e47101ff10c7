"""Small random models of every GGUF architecture: their config.json, their tensors, and files of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from mlx_lora.models.gguf.names import ARCHITECTURES
from mlx_lora.models.gguf.settings import metadata_of
from mlx_lora.models.gguf.tensors import layout_of
from tests.models.test_gguf import byte_level_vocabulary

ROPE = {"rope_theta": 10000.0}
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "head_dim": 32, "vocab_size": 272, "tie_word_embeddings": True,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "qwen3moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "tie_word_embeddings": False,
    },
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096},
    "gemma3": {
        "num_hidden_layers": 7, "rope_local_base_freq": 10000.0, "rope_theta": 1000000.0, "sliding_window": 8,
        "sliding_window_pattern": 6, "head_dim": 64,
    },
    "phi3": {"tie_word_embeddings": False},
    "granite": {
        "logits_scaling": 2.0, "residual_multiplier": 0.6, "embedding_multiplier": 3.0, "attention_multiplier": 0.3,
    },
    "lfm2": {
        "num_hidden_layers": 4, "norm_eps": 1e-5, "conv_L_cache": 3,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    },
    "gpt-oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "tie_word_embeddings": False,
        "num_hidden_layers": 4,
    },
}  # fmt: skip


def tiny_config(architecture: str) -> dict[str, Any]:
    return SIZES | OWN[architecture]


def tiny_weights(architecture: str, config: Mapping[str, Any], seed: int = 3) -> dict[str, np.ndarray]:
    """Random tensors under the file's names, in the file's form."""
    random = np.random.default_rng(seed)
    weights = {}
    for name, tensor in layout_of(ARCHITECTURES[architecture], config).items():
        around, spread = (1.0, 0.2) if tensor.kind == "norm" else (0.0, tensor.shape[-1] ** -0.5)
        spread = {"embedding": 0.15, "vector": 1.0}.get(tensor.kind, spread)
        weights[f"{name}.weight"] = random.normal(around, spread, tensor.shape)
        if tensor.bias != "never":
            weights[f"{name}.bias"] = random.normal(0, 0.3, tensor.shape[:-1])
    return {name: values.astype(np.float32) for name, values in weights.items()}


def write_tiny(
    file: Path,
    architecture: str,
    config: Mapping[str, Any] | None = None,
    *,
    kind: Callable[[str], Kind] = lambda name: Kind.F32,
    changed: Mapping[str, Any] | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
    vocabulary: Mapping[str, Any] | None = None,
    split: int = 0,
) -> Path:
    """A file of the architecture as llama.cpp's converter writes it; `changed` replaces metadata, drops None."""
    config = config or tiny_config(architecture)
    metadata = metadata_of(ARCHITECTURES[architecture], config) | dict(vocabulary or byte_level_vocabulary())
    metadata |= changed or {}
    weights = tiny_weights(architecture, config) if weights is None else weights
    writer = gguf.GGUFWriter(file, architecture, split_max_tensors=split)
    for key, value in metadata.items():
        if value is not None and key != "general.architecture":
            add(writer, key, value)
    for name, values in weights.items():
        chosen = kind(name) if values.ndim > 1 and name.endswith(".weight") and "conv.conv" not in name else Kind.F32
        writer.add_tensor(name, gguf.quants.quantize(values, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    adders = {
        int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool,
        list: writer.add_array,
    }  # fmt: skip
    adders[type(value)](key, value)
