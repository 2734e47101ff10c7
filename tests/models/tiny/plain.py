"""Tiny configurations of mlx_lm's plain decoders: softmax attention with a feed-forward part or experts.

One config.json's contents for each module of mlx_lm. The fields are those of the module's ModelArgs and of public
checkpoints' config.json files; the sizes are made small by hand, with every kind of layer a module can have present,
and the features that only some checkpoints of a module switch on are switched on together.
"""

from __future__ import annotations

from typing import Any

COMMON: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
}  # fmt: skip
LOCAL, FULL = "sliding_attention", "full_attention"
FOUR: dict[str, Any] = {"num_hidden_layers": 4, "sliding_window": 4, "layer_types": [LOCAL, LOCAL, LOCAL, FULL]}
EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True,
}  # fmt: skip
ROUTED: dict[str, Any] = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "norm_topk_prob": True, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "n_group": 1, "topk_group": 1,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc",
}  # fmt: skip
GRANITE: dict[str, Any] = {
    "logits_scaling": 4.0, "attention_multiplier": 0.25, "embedding_multiplier": 12.0, "residual_multiplier": 0.5,
    "tie_word_embeddings": True,
}  # fmt: skip
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN: dict[str, Any] = {
    "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 32,
}  # fmt: skip
ALPHA: dict[str, Any] = {
    "type": "dynamic", "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
    "mscale_all_dim": 1.0,
}  # fmt: skip


def longrope(kind: str, pairs: int) -> dict[str, Any]:
    """A `rope_scaling` with a factor of its own for each of so many pairs of rotated dimensions."""
    return {
        kind: "longrope", "short_factor": [1.0 + 0.05 * i for i in range(pairs)],
        "long_factor": [1.0 + 0.5 * i for i in range(pairs)],
    }  # fmt: skip


# What differs from COMMON.
_DECODERS: dict[str, dict[str, Any]] = {
    "Klear": {**EXPERTS, "mlp_only_layers": [0], "decoder_sparse_step": 1, "n_shared_experts": 1},
    "afmoe": {
        **FOUR, **EXPERTS, "num_shared_experts": 1, "num_dense_layers": 1, "route_norm": True, "route_scale": 2.826,
        "score_func": "sigmoid", "n_group": 1, "topk_group": 1, "mup_enabled": True,
    },
    "apertus": {"post_norm": False, "qk_norm": True, "hidden_act": "xielu", "rope_scaling": LLAMA3},
    "bailing_moe": {
        **EXPERTS, "num_shared_experts": 1, "first_k_dense_replace": 1, "use_bias": False, "use_qkv_bias": False,
        "norm_head": False, "use_qk_norm": True, "partial_rotary_factor": 0.5, "moe_router_enable_expert_bias": True,
        "routed_scaling_factor": 2.5, "score_function": "sigmoid", "n_group": 2, "topk_group": 1,
    },
    "cohere": {"layer_norm_eps": 1e-5, "logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": {
        "num_hidden_layers": 4, "sliding_window": 4, "sliding_window_pattern": 4, "layer_norm_eps": 1e-5,
        "logit_scale": 0.25,
    },
    "deepseek": {**ROUTED, "n_shared_experts": 2, "moe_layer_freq": 1},
    "dots1": {**ROUTED, "n_shared_experts": 2},
    "ernie4_5": {"use_bias": False, "tie_word_embeddings": True},
    "ernie4_5_moe": {
        "use_bias": False, "tie_word_embeddings": True, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64,
        "moe_capacity": [4, 4, 4], "moe_layer_start_index": 1, "moe_layer_end_index": 1, "moe_layer_interval": 1,
        "moe_use_aux_free": True, "moe_num_shared_experts": 2, "moe_gate_act": "softmax",
    },
    "exaone": {"num_layers": 2, "layer_norm_epsilon": 1e-5, "rope_scaling": LLAMA3},
    "exaone4": {
        "num_hidden_layers": 4, "sliding_window": 4, "sliding_window_pattern": "LLLG", "rope_scaling": LLAMA3,
    },
    "exaone_moe": {
        **FOUR, **EXPERTS, "num_shared_experts": 1, "is_moe_layer": [False, True, True, True], "n_group": 1,
        "topk_group": 1, "routed_scaling_factor": 2.5,
    },
    "gemma": {},
    "gemma2": {
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 16,
    },
    "gemma3_text": {
        "num_hidden_layers": 4, "sliding_window": 4, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16,
        "rope_local_base_freq": 1000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma4_text": {
        "num_hidden_layers": 4, "layer_types": [LOCAL, FULL, LOCAL, FULL], "sliding_window": 4, "global_head_dim": 32,
        "num_global_key_value_heads": 1, "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "attention_k_eq_v": True,
        "final_logit_softcapping": 30.0, "tie_word_embeddings": True, "enable_moe_block": True, "num_experts": 4,
        "top_k_experts": 2, "moe_intermediate_size": 64,
        "rope_parameters": {
            FULL: {"rope_type": "proportional", "rope_theta": 100000.0, "partial_rotary_factor": 0.25},
            LOCAL: {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "glm": {"attention_bias": True},
    "glm4": {"attention_bias": True, "partial_rotary_factor": 0.5},
    "glm4_moe": {
        **ROUTED, "attention_bias": True, "use_qk_norm": True, "partial_rotary_factor": 0.5, "rope_scaling": None,
    },
    "gpt_oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4, "layer_types": [LOCAL, FULL],
        "attention_bias": True, "swiglu_limit": 7.0, "rope_scaling": {**YARN, "truncate": False},
    },
    "granite": GRANITE,
    "granitemoe": {**GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": {},
    "hunyuan": {
        "num_hidden_layers": 4, "num_experts": 4, "moe_topk": [2, 2, 2, 2], "moe_intermediate_size": [64, 64, 64, 64],
        "num_shared_expert": [1, 1, 1, 1], "use_mixed_mlp_moe": True, "use_qk_norm": True, "use_cla": True,
        "cla_share_factor": 2, "rope_scaling": ALPHA, "tie_word_embeddings": True,
    },
    "hunyuan_v1_dense": {"use_qk_norm": True, "rope_scaling": ALPHA, "tie_word_embeddings": True},
    "internlm2": {"bias": False, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "internlm3": {"bias": False, "qkv_bias": False, "rope_scaling": {"rope_type": "dynamic", "factor": 6.0}},
    "iquestloopcoder": {"loop_num": 2, "loop_window_size": 4},
    "laguna": {
        **FOUR, **EXPERTS, "layer_types": [FULL, LOCAL, LOCAL, LOCAL], "num_attention_heads_per_layer": [4, 8, 8, 8],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "shared_expert_intermediate_size": 64,
        "gating": True, "moe_routed_scaling_factor": 2.5, "rope_parameters": {
            FULL: {**YARN, "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            LOCAL: {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 1.0},
        },
    },
    "llama": {"sliding_window": 4, "layer_types": [LOCAL, FULL], "rope_scaling": LLAMA3},
    "llama4_text": {
        "num_hidden_layers": 4, "intermediate_size_mlp": 128, "no_rope_layers": [1, 1, 1, 0], "use_qk_norm": True,
        "tie_word_embeddings": True,
    },
    "mellum": {
        **FOUR, **EXPERTS, "rope_parameters": {
            FULL: {**YARN, "rope_theta": 10000.0}, LOCAL: {"rope_type": "default", "rope_theta": 1000.0},
        },
    },
    "mimo": {"num_nextn_predict_layers": 1},
    "mimo_v2_flash": {
        **ROUTED, "num_hidden_layers": 4, "hybrid_layer_pattern": [0, 1, 1, 0], "moe_layer_freq": [0, 1, 1, 1],
        "n_shared_experts": None, "routed_scaling_factor": None, "sliding_window_size": 4, "layernorm_epsilon": 1e-5,
        "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False, "swa_rope_theta": 1000.0,
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "v_head_dim": 8, "swa_head_dim": 16,
        "swa_v_head_dim": 8, "partial_rotary_factor": 0.5, "attention_value_scale": 0.707,
    },
    "minicpm": {
        "dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 12, "tie_word_embeddings": True,
        "rope_scaling": {**longrope("rope_type", 8), "original_max_position_embeddings": 64},
    },
    "minimax": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 0, "rotary_dim": 8,
        "scoring_func": "sigmoid", "use_qk_norm": True,
    },
    "ministral3": {
        "sliding_window": 4, "layer_types": [LOCAL, FULL], "rope_parameters": {
            **YARN, "type": "yarn", "rope_theta": 10000.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8,
        },
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "muse_glimmer": {
        **FOUR, "post_norm_eps": 1e-8, "qk_scale_factor": 3.87, "hidden_activation": "silu",
        "layer_rope_theta": [10000.0, 10000.0, 10000.0, 0], "rope_parameters": {"rope_theta": 10000.0},
        "final_logit_softcapping": 20.0, "output_multiplier": 0.196,
    },
    "nanbeige": {"num_loops": 2, "skip_loop_final_norm": False},
    "nanochat": {},
    "nemotron": {"hidden_act": "relu2", "norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    "nemotron-nas": {
        "num_hidden_layers": 4, "hidden_act": "silu", "rope_scaling": LLAMA3, "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 3.0}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"replace_with_linear": True}},
        ],
    },
    "olmo2": {},
    "olmo3": {**FOUR, "rope_scaling": YARN},
    "olmoe": {**EXPERTS, "norm_topk_prob": False},
    "phi": {"partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5},
    "phi3": {
        "partial_rotary_factor": 0.75, "original_max_position_embeddings": 64, "rope_scaling": longrope("type", 6),
        "tie_word_embeddings": True,
    },
    "phi3small": {
        "vocab_size": 100352, "dense_attention_every_n_layers": 2, "ff_intermediate_size": 128, "gegelu_limit": 20.0,
        "layer_norm_epsilon": 1e-5, "mup_attn_multiplier": 1.0, "mup_use_scaling": True,
        "mup_embedding_multiplier": 10.0, "mup_width_multiplier": 8.0, "rope_embedding_base": 10000.0,
        "rope_position_scale": 1.0, "blocksparse_block_size": 64, "blocksparse_num_local_blocks": 16,
        "blocksparse_vert_stride": 8, "tie_word_embeddings": True,
    },
    "phimoe": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "original_max_position_embeddings": 64,
        "router_jitter_noise": 0.01,
        "rope_scaling": {**longrope("type", 8), "short_mscale": 1.243, "long_mscale": 1.243},
    },
    "plamo": {"n_shared_head": 2},
    "plamo3": {
        "num_hidden_layers": 4, "window_size": 4, "sliding_window_pattern": 2, "rope_local_theta": 1000.0,
        "tie_word_embeddings": True,
    },
    "qwen": {"kv_channels": 16, "layer_norm_epsilon": 1e-6, "no_bias": True},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 128},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3_moe": {**EXPERTS, "mlp_only_layers": [0], "decoder_sparse_step": 1},
    "seed_oss": {"attention_bias": True, "attention_out_bias": False},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "tie_word_embeddings": True},
    "solar_open": {**ROUTED, "partial_rotary_factor": 1.0, "use_qk_norm": False, "rope_scaling": YARN},
    "spark2_5": {
        **FOUR, "hidden_act": "gelu", "gate_attn_act_mode": "sigmoid", "headwise_attn_output_gate": True,
        "tie_word_embeddings": True, "rope_parameters": {
            FULL: {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}, LOCAL: {"rope_theta": 1000.0},
        },
    },
    "stablelm": {
        "use_qkv_bias": True, "partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5, "use_parallel_residual": True,
        "qk_layernorm": True,
    },
    "starcoder2": {"norm_epsilon": 1e-5, "tie_word_embeddings": True},
    "step3p5": {
        **FOUR, "layer_types": [FULL, LOCAL, LOCAL, LOCAL], "num_attention_groups": 2, "rope_scaling": LLAMA3,
        "yarn_only_types": [FULL], "rope_theta": [10000.0, 1000.0, 1000.0, 1000.0],
        "partial_rotary_factors": [0.5, 1.0, 1.0, 1.0], "use_head_wise_attn_gate": True,
        "attention_other_setting": {"attention_type": LOCAL, "num_attention_heads": 8, "num_attention_groups": 2},
        "moe_num_experts": 4, "moe_top_k": 2, "moe_intermediate_size": 64, "share_expert_dim": 64,
        "moe_layers_enum": "1,2,3", "moe_router_scaling_factor": 3.0, "norm_expert_weight": True,
        "swiglu_limits": [0, 0, 0, 0.5], "swiglu_limits_shared": [0, 0, 0, 1.0],
    },
    "talkie": {},
    "telechat3": {"rope_scaling": {**YARN, "type": "telechat3-yarn", "mscale": 1.0, "mscale_all_dim": 1.0}},
    "youtu_llm": {
        "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
        "v_head_dim": 16, "rope_traditional": True, "tie_word_embeddings": True,
    },
}  # fmt: skip
# Those whose fields have other names.
_OTHERS: dict[str, dict[str, Any]] = {
    "afm7": {
        "vocab_size": 96, "hidden_dim": 64, "num_layers": 4, "num_kv_reuse_layers": 2, "num_heads": 4,
        "num_kv_heads": 2, "hidden_dim_scale_factor": 3.25, "rope_theta": 50000, "rms_norm_eps": 1e-5,
    },
    "dbrx": {
        "vocab_size": 96, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128,
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 500000},
    },
    "gemma3n": {
        "text_config": {
            **COMMON, "model_type": "gemma3n_text", "num_hidden_layers": 4, "num_kv_shared_layers": 2,
            "layer_types": [LOCAL, FULL, LOCAL, FULL], "sliding_window": 4, "rope_local_base_freq": 1000.0,
            "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8, "laurel_rank": 8,
            "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0], "altup_num_inputs": 4, "altup_coef_clip": 120.0,
            "altup_correct_scale": True, "altup_active_idx": 0, "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
        },
    },
    "gpt2": {
        "n_ctx": 128, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128, "layer_norm_epsilon": 1e-5,
        "vocab_size": 96,
    },
    "gpt_bigcode": {
        "n_embd": 64, "n_layer": 2, "n_inner": 128, "n_head": 4, "n_positions": 128, "layer_norm_epsilon": 1e-5,
        "vocab_size": 96, "multi_query": True, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
    },
    "gpt_neox": {
        "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 256,
        "layer_norm_eps": 1e-5, "vocab_size": 96, "max_position_embeddings": 128, "rotary_emb_base": 10000,
        "rotary_pct": 0.25, "use_parallel_residual": True,
    },
    "gptj": {
        "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128, "rotary_dim": 8, "layer_norm_epsilon": 1e-5,
        "vocab_size": 96,
    },
    "lille-130m": {
        "block_size": 128, "layer_norm_eps": 1e-5, "n_embd": 64, "n_head": 4, "n_kv_heads": 2, "n_layer": 2,
        "rope_theta": 10000.0, "vocab_size": 96, "tie_word_embeddings": True,
    },
    "openelm": {
        "head_dim": 16, "num_transformer_layers": 2, "model_dim": 64, "vocab_size": 96, "ffn_dim_divisor": 32,
        "num_query_heads": [4, 8], "num_kv_heads": [1, 2], "ffn_multipliers": [1.0, 2.0], "ffn_with_glu": True,
        "normalize_qk_projections": True, "share_input_output_layers": True, "rms_norm_eps": 1e-6,
        "rope_freq_constant": 10000,
    },
    "phixtral": {
        "num_vocab": 96, "model_dim": 64, "num_heads": 4, "num_layers": 2, "rotary_dim": 8, "num_experts_per_tok": 2,
        "num_local_experts": 4,
    },
}  # fmt: skip
_DIFFERING = {**{name: {**COMMON, **changes} for name, changes in _DECODERS.items()}, **_OTHERS}
CONFIGS: dict[str, dict[str, Any]] = {name: {"model_type": name, **_DIFFERING[name]} for name in sorted(_DIFFERING)}
UNCOVERED: dict[str, str] = {
    "bitnet": "builds, but its BitLinear is a Metal kernel, RuntimeError: [metal_kernel] No Metal back-end",
    "muse_spark": "builds, but its norms and routing are Metal kernels, RuntimeError: [metal_kernel] No Metal back-end",
    "olmo": "importing it raises SystemExit: To run olmo install ai2-olmo: pip install ai2-olmo",
}
FAULTS: dict[str, str] = {
    "afm7": "keys and values are rounded to 8 bits, so their projections' gradient is zero",
    "dbrx": "experts are chosen in numpy, so a compiled step raises ValueError: [eval] Attempting to eval an array",
    "gemma3n": "without a cache, the layers that share keys use projections of their own: other logits than with one",
    "phi3small": (
        "logits of 91 unused tokens, 100256 and on, are -inf; layers of block-sparse attention add the boolean mask to "
        "the scores, so positions see later ones"
    ),
}
