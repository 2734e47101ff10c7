"""The table of GGUF architectures: each tensor's and setting's name in a file and in an MLX model, for both directions.

The names in files are llama.cpp's. `tensors.py` explains the records and computes a model's tensors from them.
"""

from __future__ import annotations

from typing import Any

from mlx_lora.errors import ModelError
from mlx_lora.models.gguf.tensors import Architecture, Bias, Place, Setting


def architecture_named(name: str | None) -> Architecture:
    """The architecture that a file names in `general.architecture`; ModelError for one that isn't supported."""
    if name not in ARCHITECTURES:
        raise ModelError(f"GGUF architecture {name!r} is not supported; known: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def architecture_of(model_type: str | None) -> Architecture:
    """The architecture of the `model_type` of a config.json; ModelError for one without a GGUF form here."""
    for architecture in ARCHITECTURES.values():
        if model_type in architecture.model_types:
            return architecture
    known = ", ".join(name for architecture in ARCHITECTURES.values() for name in architecture.model_types)
    raise ModelError(f"model type {model_type!r} has no GGUF form here; known: {known}")


def _norm(path: str, sizes: str = "hidden", **options: Any) -> Place:
    return Place(path, sizes, "norm", **options)


def _attention(bias: Bias = "never", output_bias: Bias = "never") -> dict[str, Place]:
    return {
        "attn_q": Place("self_attn.q_proj", "queries hidden", bias=bias),
        "attn_k": Place("self_attn.k_proj", "keys hidden", bias=bias),
        "attn_v": Place("self_attn.v_proj", "keys hidden", bias=bias),
        "attn_output": Place("self_attn.o_proj", "hidden queries", bias=output_bias),
    }


def _feed_forward(bias: Bias = "never") -> dict[str, Place]:
    return {
        "ffn_gate": Place("mlp.gate_proj", "inner hidden", bias=bias),
        "ffn_up": Place("mlp.up_proj", "inner hidden", bias=bias),
        "ffn_down": Place("mlp.down_proj", "hidden inner", bias=bias),
    }


def _experts(path: str, router: str, bias: Bias = "never") -> dict[str, Place]:
    return {
        "ffn_gate_inp": Place(router, "experts hidden", bias=bias),
        "ffn_gate_exps": Place(f"{path}.gate_proj", "experts expert_inner hidden", "experts", bias),
        "ffn_up_exps": Place(f"{path}.up_proj", "experts expert_inner hidden", "experts", bias),
        "ffn_down_exps": Place(f"{path}.down_proj", "experts hidden expert_inner", "experts", bias),
    }


_EMBEDDING = {"token_embd": Place("model.embed_tokens", "vocabulary hidden", "embedding")}
_MODEL = _EMBEDDING | {"output_norm": _norm("model.norm")}
_NORMS = {"attn_norm": _norm("input_layernorm"), "ffn_norm": _norm("post_attention_layernorm")}
_HEAD_NORMS = {
    "attn_q_norm": _norm("self_attn.q_norm", "head"),
    "attn_k_norm": _norm("self_attn.k_norm", "head"),
}
_LLAMA = _NORMS | _attention("optional", "optional") | _feed_forward("optional")
_GEMMA = _attention() | _feed_forward() | {
    "attn_norm": _norm("input_layernorm"), "post_attention_norm": _norm("post_attention_layernorm"),
    "ffn_norm": _norm("pre_feedforward_layernorm"), "post_ffw_norm": _norm("post_feedforward_layernorm"),
}  # fmt: skip
_PHI3 = _NORMS | {
    "attn_qkv": Place("self_attn.qkv_proj", "qkv hidden"), "attn_output": Place("self_attn.o_proj", "hidden queries"),
    "ffn_up": Place("mlp.gate_up_proj", "gate_up hidden"), "ffn_down": Place("mlp.down_proj", "hidden inner"),
}  # fmt: skip
_GPT_OSS = _attention("always", "always") | _experts("mlp.experts", "mlp.router", "always") | {
    "attn_norm": _norm("input_layernorm"), "post_attention_norm": _norm("post_attention_layernorm"),
    "attn_sinks": Place("self_attn.sinks", "heads", "vector"),
}  # fmt: skip
_LFM2 = {
    "attn_norm": _norm("operator_norm"), "ffn_norm": _norm("ffn_norm"),
    "attn_q": Place("self_attn.q_proj", "queries hidden", layers="attention"),
    "attn_k": Place("self_attn.k_proj", "keys hidden", layers="attention"),
    "attn_v": Place("self_attn.v_proj", "keys hidden", layers="attention"),
    "attn_output": Place("self_attn.out_proj", "hidden queries", layers="attention"),
    "attn_q_norm": _norm("self_attn.q_layernorm", "head", layers="attention"),
    "attn_k_norm": _norm("self_attn.k_layernorm", "head", layers="attention"),
    "shortconv.conv": Place("conv.conv", "hidden taps", "convolution", layers="convolution"),
    "shortconv.in_proj": Place("conv.in_proj", "hidden3 hidden", layers="convolution"),
    "shortconv.out_proj": Place("conv.out_proj", "hidden hidden", layers="convolution"),
    "ffn_gate": Place("feed_forward.w1", "inner hidden"), "ffn_up": Place("feed_forward.w3", "inner hidden"),
    "ffn_down": Place("feed_forward.w2", "hidden inner"),
}  # fmt: skip

_SETTINGS = (
    Setting("hidden_size", "embedding_length"),
    Setting("num_hidden_layers", "block_count"),
    Setting("num_attention_heads", "attention.head_count"),
    Setting("num_key_value_heads", "attention.head_count_kv", default="num_attention_heads"),
    Setting("intermediate_size", "feed_forward_length"),
    Setting("max_position_embeddings", "context_length"),
    Setting("rope_theta", "rope.freq_base", float, 10000.0),
)
_EPSILON = Setting("rms_norm_eps", "attention.layer_norm_rms_epsilon", float)
_EXPERTS_USED = Setting("num_experts_per_tok", "expert_used_count")
_COMMON = (*_SETTINGS, _EPSILON)
_GEMMA2_SETTINGS = (
    *_COMMON,
    Setting("attn_logit_softcapping", "attn_logit_softcapping", float, 50.0),
    Setting("final_logit_softcapping", "final_logit_softcapping", float, 30.0),
    Setting("sliding_window", "attention.sliding_window", default=4096),
)
_GEMMA3_SETTINGS = (
    *_COMMON,
    Setting("rope_local_base_freq", "rope.freq_base_swa", float, 10000.0),
    Setting("sliding_window", "attention.sliding_window"),
    Setting("sliding_window_pattern", "attention.sliding_window_pattern", default=6),
)
_GRANITE_SETTINGS = (
    *_COMMON,
    Setting("logits_scaling", "logit_scale", float),
    Setting("residual_multiplier", "residual_scale", float, 1.0),
    Setting("embedding_multiplier", "embedding_scale", float, 1.0),
    Setting("attention_multiplier", "attention.scale", float, 0.0),
)
_MOE_SETTINGS = (
    Setting("moe_intermediate_size", "expert_feed_forward_length"),
    *(setting for setting in _COMMON if setting.key != "intermediate_size"),
    Setting("intermediate_size", "feed_forward_length", default="moe_intermediate_size"),
    Setting("num_experts", "expert_count"),
    _EXPERTS_USED,
)
_GPT_OSS_SETTINGS = (
    *(setting for setting in _COMMON if setting.key != "intermediate_size"),
    Setting("intermediate_size", "expert_feed_forward_length"),
    Setting("num_local_experts", "expert_count"),
    _EXPERTS_USED,
    Setting("sliding_window", "attention.sliding_window"),
)
_LFM2_SETTINGS = (
    *_SETTINGS,
    Setting("norm_eps", "attention.layer_norm_rms_epsilon", float),
    Setting("conv_L_cache", "shortconv.l_cache"),
)

_SILU = {"hidden_act": "silu"}
_GELU = {"hidden_activation": "gelu_pytorch_tanh"}

_ALL = (
    Architecture("llama", ("llama", "mistral"), "LlamaForCausalLM", _MODEL, _LLAMA, _COMMON, rotary_pairs=True),
    Architecture(
        "qwen2", ("qwen2",), "Qwen2ForCausalLM", _MODEL, _NORMS | _attention("always") | _feed_forward(), _COMMON,
        own_head_dim=False, fixed=_SILU,
    ),
    Architecture(
        "qwen3", ("qwen3",), "Qwen3ForCausalLM", _MODEL, _NORMS | _attention() | _HEAD_NORMS | _feed_forward(),
        _COMMON, fixed=_SILU,
    ),
    Architecture(
        "qwen3moe", ("qwen3_moe",), "Qwen3MoeForCausalLM", _MODEL,
        _NORMS | _attention() | _HEAD_NORMS | _experts("mlp.switch_mlp", "mlp.gate"), _MOE_SETTINGS, scalings=(),
        fixed=_SILU | {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    ),
    Architecture(
        "gemma2", ("gemma2",), "Gemma2ForCausalLM", _MODEL, _GEMMA, _GEMMA2_SETTINGS,
        head="never", norms_plus_one=True, scalings=(), fixed=_GELU,
    ),
    Architecture(
        "gemma3", ("gemma3_text",), "Gemma3ForCausalLM", _MODEL, _GEMMA | _HEAD_NORMS, _GEMMA3_SETTINGS,
        norms_plus_one=True, scalings=("linear",), fixed=_GELU,
    ),
    Architecture(
        "phi3", ("phi3",), "Phi3ForCausalLM", _MODEL, _PHI3, _COMMON, tied=False, own_head_dim=False,
        scalings=("longrope",), fixed=_SILU, ignored=("attention.sliding_window",),
    ),
    Architecture(
        "granite", ("granite",), "GraniteForCausalLM", _MODEL, _LLAMA, _GRANITE_SETTINGS,
        own_head_dim=False, rotary_pairs=True, fixed=_SILU,
    ),
    Architecture(
        "lfm2", ("lfm2",), "Lfm2ForCausalLM", _EMBEDDING | {"token_embd_norm": _norm("model.embedding_norm")}, _LFM2,
        _LFM2_SETTINGS, head="never", own_head_dim=False, scalings=(),
        fixed={
            "conv_bias": False, "block_auto_adjust_ff_dim": False, "block_multiple_of": 1,
            "block_ffn_dim_multiplier": 1.0,
        },
    ),
    Architecture(
        "gpt-oss", ("gpt_oss",), "GptOssForCausalLM", _MODEL, _GPT_OSS, _GPT_OSS_SETTINGS, head="always", tied=False,
        scalings=("linear", "yarn"), fixed=_SILU | {"attention_bias": True},
    ),
)  # fmt: skip
ARCHITECTURES: dict[str, Architecture] = {architecture.name: architecture for architecture in _ALL}
