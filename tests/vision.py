"""Tiny vision checkpoints with random weights, under the names and in the layouts of the published ones.

The text part is made by mlx_lm's own modules and taken back to what its `sanitize` expects of a first file. The vision
part is what mlx_vlm's modules ask for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from tests.conftest import VOCABULARY, write_tokenizer

Tensors = dict[str, mx.array]
PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")

QWEN35: dict[str, Any] = {
    "model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"], "eos_token_id": 256,
    "image_token_id": 258, "video_token_id": 259, "vision_start_token_id": 260, "vision_end_token_id": 261,
    "vocab_size": VOCABULARY,
    "text_config": {
        "model_type": "qwen3_5_text", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-6,
        "vocab_size": VOCABULARY, "max_position_embeddings": 512, "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4, "tie_word_embeddings": False, "attention_bias": False,
        "mtp_num_hidden_layers": 1,
        "rope_parameters": {
            "type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0, "partial_rotary_factor": 0.25,
        },
    },
    "vision_config": {
        "model_type": "qwen3_5", "depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64,
        "num_heads": 2, "patch_size": 4, "in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [],
    },
}  # fmt: skip
GEMMA3: dict[str, Any] = {
    "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": 256,
    "vocab_size": VOCABULARY, "hidden_size": 64, "mm_tokens_per_image": 4, "image_token_index": 258,
    "text_config": {
        "model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128,
        "num_attention_heads": 4, "head_dim": 32, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
        "sliding_window": 32, "sliding_window_pattern": 3, "query_pre_attn_scalar": 32, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512, "mm_tokens_per_image": 4, "rope_theta": 1e6, "rope_global_base_freq": 1e6,
        "rope_local_base_freq": 1e4,
    },
    "vision_config": {
        "model_type": "siglip_vision_model", "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64,
        "num_attention_heads": 2, "patch_size": 4, "image_size": 16, "num_channels": 3,
    },
}  # fmt: skip


def write_qwen35(path: Path, *, dtype: mx.Dtype = mx.bfloat16) -> Path:
    """A Qwen3.5-like checkpoint with a head for further tokens (`mtp.`)."""
    text = {}
    for name, array in _text(QWEN35).items():
        if name.endswith("conv1d.weight"):
            array = array.moveaxis(1, 2)
        if name.endswith(("layernorm.weight", "model.norm.weight", "q_norm.weight", "k_norm.weight")):
            array = array - 1
        head = name.startswith("language_model.lm_head")
        text[name.removeprefix("language_model.") if head else name.replace("language_model.model", LANGUAGE)] = array
    heads = _random({"mtp.fc.weight": (64, 128), "mtp.layers.0.input_layernorm.weight": (64,)})
    return _write(path, QWEN35, text | heads | _qwen_vision("model.visual"), dtype)


LANGUAGE = "model.language_model"


def write_gemma3(path: Path, *, dtype: mx.Dtype = mx.bfloat16) -> Path:
    """A Gemma-3-like checkpoint; its output head is its embedding, as in the published ones."""
    text = {name: array for name, array in _text(GEMMA3).items() if "lm_head" not in name}
    return _write(path, GEMMA3, text | _siglip(), dtype)


WRITERS: dict[str, Callable[[Path], Path]] = {"qwen3_5": write_qwen35, "gemma3": write_gemma3}


def _text(config: dict[str, Any]) -> Tensors:
    """Random weights of the text part, each as large as where training begins, under mlx_lm's own names."""
    module = import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(json.loads(json.dumps(config))))
    return dict(tree_flatten(model.parameters()))


def _random(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    return {
        name: 0.1 * mx.random.normal(shape, key=mx.random.key(number))
        for number, (name, shape) in enumerate(shapes.items())
    }


def _qwen_vision(root: str) -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (32, 3, 2, 4, 4), "patch_embed.proj.bias": (32,), "pos_embed.weight": (16, 32),
    }  # fmt: skip
    for layer in range(2):
        block = f"blocks.{layer}"
        for norm in ("norm1", "norm2"):
            shapes |= _linear(f"{block}.{norm}", 32)
        shapes |= _linear(f"{block}.attn.qkv", 96, 32) | _linear(f"{block}.attn.proj", 32, 32)
        shapes |= _linear(f"{block}.mlp.linear_fc1", 64, 32) | _linear(f"{block}.mlp.linear_fc2", 32, 64)
    shapes |= (
        _linear("merger.norm", 32) | _linear("merger.linear_fc1", 128, 128) | _linear("merger.linear_fc2", 64, 128)
    )
    return _random({f"{root}.{name}": shape for name, shape in shapes.items()})


def _siglip() -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.patch_embedding.weight": (32, 3, 4, 4), "embeddings.patch_embedding.bias": (32,),
        "embeddings.position_embedding.weight": (16, 32),
    }  # fmt: skip
    for layer in range(2):
        block = f"encoder.layers.{layer}"
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= _linear(f"{block}.{norm}", 32)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{block}.self_attn.{projection}", 32, 32)
        shapes |= _linear(f"{block}.mlp.fc1", 64, 32) | _linear(f"{block}.mlp.fc2", 32, 64)
    shapes |= _linear("post_layernorm", 32)
    projector = {"mm_input_projection_weight": (32, 64), "mm_soft_emb_norm.weight": (32,)}
    return _random({f"vision_tower.vision_model.{name}": shape for name, shape in shapes.items()}) | _random(
        {f"multi_modal_projector.{name}": shape for name, shape in projector.items()}
    )


def _linear(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _write(path: Path, config: dict[str, Any], tensors: Tensors, dtype: mx.Dtype) -> Path:
    """Two shards and their index, as large checkpoints have; one vision tensor is float32 among others in `dtype`."""
    path.mkdir(parents=True, exist_ok=True)
    cast = {name: array.astype(dtype) for name, array in tensors.items()}
    odd = next(name for name in sorted(cast) if name.endswith("position_embedding.weight") or "pos_embed" in name)
    cast[odd] = tensors[odd].astype(mx.float32)
    names, index = sorted(cast), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        mx.save_safetensors(str(path / file), {name: cast[name] for name in part}, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (path / "config.json").write_text(json.dumps(config))
    for file in PROCESSORS:
        (path / file).write_text(f'{{"image_processor_type": "TinyImageProcessor",\n   "from": "{file}"}}')
    write_tokenizer(path)
    return path
