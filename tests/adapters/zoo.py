"""Tiny random models of the architectures whose endings, projections or experts differ."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

VOCABULARY = 96
COMMON: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": VOCABULARY, "max_position_embeddings": 128,
    "rope_theta": 10000.0, "head_dim": 16, "tie_word_embeddings": True,
}  # fmt: skip
MOE = {
    "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "moe_intermediate_size": 64, "norm_topk_prob": True,
}  # fmt: skip
GRANITE = {
    "logits_scaling": 4.0, "attention_multiplier": 0.25, "embedding_multiplier": 12.0, "residual_multiplier": 0.5,
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
# name -> (mlx-lm's model_type, what differs from COMMON)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama untied": ("llama", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {}),
    "gemma2 soft caps": ("gemma2", {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {"sliding_window": 4, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16}),
    "cohere logit scale": ("cohere", {"logit_scale": 0.25}),
    "granite": ("granite", GRANITE),
    "phi3 fused qkv": ("phi3", {"tie_word_embeddings": False}),
    "qwen3 experts": ("qwen3_moe", {**MOE, "tie_word_embeddings": False}),
    "mixtral experts": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def network(name: str, *, seed: int = 0, dtype: mx.Dtype = mx.float32) -> nn.Module:
    """A frozen model with random weights, large enough that its logits differ."""
    kind, changes = MODELS[name]
    module = import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(seed)
    model: nn.Module = module.Model(module.ModelArgs.from_dict({"model_type": kind, **COMMON, **changes}))
    noise = [(path, array + 0.1 * mx.random.normal(array.shape)) for path, array in tree_flatten(model.parameters())]
    model.load_weights(noise)
    model.set_dtype(dtype)
    model.freeze()
    model.eval()
    mx.eval(model.parameters())
    return model
