"""Tiny configurations of the models in mlx_lm that are more than a row of ordinary decoder layers.

Latent attention, recurrences, short convolutions, hybrids of these with attention, indexers, and wrappers around a
text model. Which keys there are, and which features are on, comes from each module's ModelArgs and from public
config.json files; the sizes were made small by hand, so that each model runs in a moment and still has every kind of
layer.
"""

from __future__ import annotations

from typing import Any

COMMON: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "vocab_size": 96, "max_position_embeddings": 128,
    "rope_theta": 10000.0, "attention_bias": False, "tie_word_embeddings": False,
}  # fmt: skip
YARN: dict[str, Any] = {
    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
WINDOWS: dict[str, Any] = {
    "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
LATENT: dict[str, Any] = {
    **COMMON, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
ROUTED: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 64,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 2, "topk_group": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    **LATENT, **ROUTED, "num_hidden_layers": 3, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip
QWEN: dict[str, Any] = {
    **COMMON, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "full_attention_interval": 2,
    "rope_parameters": {
        "type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
    },
}  # fmt: skip
QWEN_ROUTED: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
}  # fmt: skip
KIMI: dict[str, Any] = {
    **LATENT, "mla_use_nope": True, "num_experts": 4, "num_experts_per_token": 2, "num_shared_experts": 1,
    "moe_intermediate_size": 64, "moe_router_activation_func": "sigmoid", "moe_renormalize": True,
    "routed_scaling_factor": 2.5, "first_k_dense_replace": 1, "moe_layer_freq": 1, "use_grouped_topk": True,
    "num_expert_group": 1, "topk_group": 1, "model_max_length": 128,
    "linear_attn_config": {
        "kda_layers": [1, 2, 4], "full_attn_layers": [3], "num_heads": 4, "head_dim": 16, "short_conv_kernel_size": 4,
    },
}  # fmt: skip
BAILING: dict[str, Any] = {
    **COMMON, "num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1, "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True, "layer_group_size": 2, "group_norm_size": 4, "use_qk_norm": True,
    "use_bias": False, "use_qkv_bias": False, "partial_rotary_factor": 0.5,
}  # fmt: skip
LONGCAT: dict[str, Any] = {
    **LATENT, "num_layers": 2, "attention_method": "MLA", "zero_expert_type": "identity", "zero_expert_num": 2,
    "ffn_hidden_size": 128, "expert_ffn_hidden_size": 64, "n_routed_experts": 4, "moe_topk": 2,
    "mla_scale_q_lora": True, "mla_scale_kv_lora": True, "routed_scaling_factor": 6.0, "router_bias": False,
    "norm_topk_prob": False,
}  # fmt: skip
LFM: dict[str, Any] = {
    **COMMON, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "norm_eps": 1e-5,
    "conv_bias": False, "conv_L_cache": 3, "block_dim": 64, "block_ff_dim": 128, "block_multiple_of": 32,
    "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": True,
}  # fmt: skip
INDEXER: dict[str, Any] = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 4}
# name of mlx_lm's module -> contents of config.json
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_5": {"model_type": "qwen3_5", "text_config": {**QWEN, "model_type": "qwen3_5_text"}},
    "qwen3_5_moe": {
        "model_type": "qwen3_5_moe", "text_config": {**QWEN, **QWEN_ROUTED, "model_type": "qwen3_5_moe_text"},
    },
    "qwen3_next": {
        **QWEN, **QWEN_ROUTED, "model_type": "qwen3_next", "full_attention_interval": 4, "partial_rotary_factor": 0.25,
    },
    "nemotron_h": {
        **COMMON, "model_type": "nemotron_h", "hybrid_override_pattern": "M-*EM", "num_hidden_layers": 5,
        "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "conv_kernel": 4, "n_groups": 2,
        "mamba_proj_bias": False, "mlp_bias": False, "use_bias": False, "use_conv_bias": True,
        "layer_norm_epsilon": 1e-5, "time_step_limit": [0.0, float("inf")], "n_routed_experts": 4,
        "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "moe_shared_expert_intermediate_size": 64, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    "lfm2": {**LFM, "model_type": "lfm2"},
    "granitemoehybrid": {
        **COMMON, "model_type": "granitemoehybrid", "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"], "position_embedding_type": "nope", "logits_scaling": 4.0,
        "attention_multiplier": 0.25, "embedding_multiplier": 12.0, "residual_multiplier": 0.5, "mlp_bias": False,
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64, "mamba_n_heads": 8,
        "mamba_d_head": 16, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_n_groups": 1, "mamba_conv_bias": True,
        "mamba_proj_bias": False, "tie_word_embeddings": True,
    },
    "kimi_linear": {**KIMI, "model_type": "kimi_linear", "q_lora_rank": None},
    "deepseek_v3": {**DEEPSEEK, "model_type": "deepseek_v3"},
    "gpt_oss": {
        **COMMON, **WINDOWS, "model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2,
        "rope_scaling": {**YARN, "truncate": False}, "attention_bias": True,
    },
    "gemma3n": {
        "model_type": "gemma3n",
        "text_config": {
            **COMMON, **WINDOWS, "model_type": "gemma3n_text", "num_kv_shared_layers": 2, "laurel_rank": 16,
            "vocab_size_per_layer_input": 80, "hidden_size_per_layer_input": 16, "altup_num_inputs": 4,
            "altup_active_idx": 0, "altup_coef_clip": 120.0, "altup_correct_scale": True,
            "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0], "intermediate_size": [128] * 4,
            "final_logit_softcapping": 30.0, "rope_local_base_freq": 10000.0, "rope_theta": 1000000.0,
        },
    },
    "deepseek_v32": {**DEEPSEEK, **INDEXER, "model_type": "deepseek_v32"},
    "glm4_moe_lite": {
        **LATENT, **ROUTED, "model_type": "glm4_moe_lite", "num_hidden_layers": 3, "routed_scaling_factor": 1.8,
        "n_group": 1,
    },
    "kimi_vl": {
        "model_type": "kimi_vl",
        "text_config": {**LATENT, **ROUTED, "num_hidden_layers": 3, "q_lora_rank": None, "n_group": 1},
    },
    "longcat_flash": {**LONGCAT, "model_type": "longcat_flash"},
    "longcat_flash_ngram": {
        **LONGCAT, "model_type": "longcat_flash_ngram", "ngram_vocab_size_ratio": 2, "emb_neighbor_num": 3,
        "emb_split_num": 2,
    },
    "mistral4": {
        **LATENT, **ROUTED, "model_type": "mistral4", "num_hidden_layers": 2, "first_k_dense_replace": 0, "n_group": 1,
        "routed_scaling_factor": 1.0, "rope_interleave": True,
        "rope_parameters": {
            **YARN, "rope_theta": 10000.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5,
            "original_max_position_embeddings": 8, "factor": 16.0,
        },
    },
    "bailing_hybrid": {**LATENT, **BAILING, "model_type": "bailing_hybrid"},
    "bailing_moe_v3": {
        **LATENT, **BAILING, "model_type": "bailing_hybrid", "short_conv_kernel_size": 4, "kda_lower_bound": -5.0,
        "kda_safe_gate": True, "no_kda_lora": True, "rope_interleave": True,
    },
    "kimi_k3": {
        "model_type": "kimi_k3",
        "text_config": {
            **KIMI, "model_type": "kimi_linear", "hidden_act": "situ", "activation_situ_beta": 4.0,
            "activation_situ_linear_beta": 8.0, "attn_res_block_size": 2, "mla_use_output_gate": True,
            "routed_expert_hidden_size": 32, "latent_moe_use_norm": True,
            "linear_attn_config": {
                **KIMI["linear_attn_config"], "gate_lower_bound": -5.0, "use_full_rank_gate": True,
            },
        },
    },
    "olmo_hybrid": {
        **COMMON, "model_type": "olmo_hybrid", "num_hidden_layers": 3, "num_key_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_key_heads": 4,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4, "linear_allow_neg_eigval": True,
    },
    "mamba2": {
        **COMMON, "model_type": "mamba2", "num_hidden_layers": 2, "num_heads": 4, "state_size": 16, "conv_kernel": 4,
        "n_groups": 2, "use_bias": False, "use_conv_bias": True, "layer_norm_epsilon": 1e-5,
        "time_step_limit": [0.0, float("inf")], "time_step_rank": 4, "tie_word_embeddings": True,
    },
    "falcon_h1": {
        **COMMON, "model_type": "falcon_h1", "num_hidden_layers": 2, "mamba_d_ssm": 64, "mamba_n_heads": 4,
        "mamba_d_head": 16, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_n_groups": 2, "mamba_conv_bias": True,
        "mamba_rms_norm": False, "mamba_norm_before_gate": False, "mamba_proj_bias": False,
    },
    "bailing_moe_linear": {**BAILING, "model_type": "bailing_moe_linear"},
    "baichuan_m1": {
        **COMMON, "model_type": "baichuan_m1", "sliding_window": 4, "sliding_window_layers": [1, 3], "conv_window": 2,
        "num_swa_attention_heads": 2, "num_swa_key_value_heads": 1,
    },
    "deepseek_v2": {
        **DEEPSEEK, "model_type": "deepseek_v2", "topk_method": "group_limited_greedy",
        "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek_v41": {
        **COMMON, "model_type": "deepseek_v41", "head_dim": 32, "q_lora_rank": 16, "qk_rope_head_dim": 8,
        "o_groups": 2, "o_lora_rank": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 64, "scoring_func": "sqrtsoftplus", "norm_topk_prob": True,
        "routed_scaling_factor": 1.5, "swiglu_limit": 10.0, "sliding_window": 4, "compress_ratios": [0, 2, 2, 2],
        "kv_source_layer_ids": [1], "index_source_layer_ids": [1, 3], "candidate_source_layer_id": 1,
        "candidate_topk_blocks": 2, "candidate_block_size": 2, "index_n_heads": 2, "index_head_dim": 32,
        "index_topk": 2, "rope_scaling": YARN, "hc_mult": 2, "hc_sinkhorn_iters": 3, "engram_layer_ids": [],
    },
    "gear": {
        **COMMON, "model_type": "gear", "sliding_window": 4, "conv_L_cache": 3, "attn_logit_softcapping": 50.0,
        "layer_types": ["conv_mixer", "sliding_attention", "full_attention", "conv_mixer"],
        "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 16, "tie_word_embeddings": True,
    },
    "gemma3": {
        "model_type": "gemma3", "vocab_size": 96, "text_config": {
            **COMMON, "model_type": "gemma3_text", "sliding_window": 4, "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 16, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    },
    "gemma4": {
        "model_type": "gemma4", "vocab_size": 96, "text_config": {
            **COMMON, **WINDOWS, "model_type": "gemma4_text", "global_head_dim": 32, "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 96, "use_double_wide_mlp": True,
            "final_logit_softcapping": 30.0, "tie_word_embeddings": True, "rope_parameters": {
                "full_attention": {
                    "rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    },
    "glm_moe_dsa": {
        **LATENT, **ROUTED, **INDEXER, "model_type": "glm_moe_dsa", "num_hidden_layers": 3, "n_group": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "indexer_rope_interleave": True,
    },
    "jamba": {
        **COMMON, "model_type": "jamba", "num_hidden_layers": 3, "attn_layer_offset": 1, "attn_layer_period": 2,
        "expert_layer_offset": 1, "expert_layer_period": 2, "num_experts": 4, "num_experts_per_tok": 2,
        "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2, "mamba_dt_rank": 4, "mamba_conv_bias": True,
        "mamba_proj_bias": False,
    },
    "kimi_k25": {"model_type": "kimi_k25", "text_config": {**DEEPSEEK, "model_type": "deepseek_v3", "n_group": 1}},
    "lfm2-vl": {"model_type": "lfm2-vl", "text_config": {**LFM, "model_type": "lfm2"}},
    "lfm2_moe": {
        **LFM, "model_type": "lfm2_moe", "num_dense_layers": 1, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 64, "norm_topk_prob": True, "use_expert_bias": True, "routed_scaling_factor": 1.0,
    },
    "llama4": {
        "model_type": "llama4", "text_config": {
            **COMMON, "model_type": "llama4_text", "attention_chunk_size": 8, "interleave_moe_layer_step": 2,
            "intermediate_size": 64, "intermediate_size_mlp": 128, "num_local_experts": 4, "num_experts_per_tok": 1,
            "use_qk_norm": True, "rope_scaling": None, "attn_temperature_tuning": 4, "floor_scale": 4,
            "attn_scale": 0.1,
        },
    },
    "mamba": {
        **COMMON, "model_type": "mamba", "num_hidden_layers": 2, "state_size": 16, "conv_kernel": 4,
        "time_step_rank": 4, "use_bias": False, "use_conv_bias": True, "tie_word_embeddings": True,
    },
    "minicpm3": {
        **LATENT, "model_type": "minicpm3", "num_hidden_layers": 2, "dim_model_base": 32, "scale_depth": 1.4,
        "scale_emb": 12, "rope_scaling": {
            "type": "longrope", "original_max_position_embeddings": 32, "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
        },
    },
    "minimax_m3_vl": {
        "model_type": "minimax_m3_vl", "text_config": {
            **COMMON, "model_type": "minimax_m3", "num_hidden_layers": 3, "intermediate_size": 64,
            "dense_intermediate_size": 128, "shared_intermediate_size": 64, "num_local_experts": 4,
            "num_experts_per_tok": 2, "rotary_dim": 8, "use_qk_norm": True, "use_gemma_norm": True,
            "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "routed_scaling_factor": 2.0, "moe_layer_freq": [0, 1, 1],
            "sparse_attention_config": {
                "sparse_num_index_heads": 2, "sparse_index_dim": 16, "sparse_block_size": 2, "sparse_topk_blocks": 2,
                "sparse_local_block": 1, "sparse_attention_freq": [0, 1, 1],
            },
        },
    },
    "mistral3": {
        "model_type": "mistral3", "text_config": {
            **COMMON, "model_type": "ministral3", "num_hidden_layers": 2, "rope_parameters": {
                **YARN, "rope_theta": 10000.0, "llama_4_scaling_beta": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 8, "factor": 16.0,
            },
        },
    },
    "pixtral": {"model_type": "pixtral", "text_config": {**COMMON, "model_type": "mistral", "num_hidden_layers": 2}},
    "plamo2": {
        **COMMON, "model_type": "plamo2", "num_hidden_layers": 3, "hidden_size_per_head": 16, "mamba_step": 2,
        "mamba_num_heads": 4, "mamba_d_state": 16, "mamba_d_conv": 4, "attention_window_size": 128,
        "tie_word_embeddings": True,
    },
    # Packed are the MLPs of all layers but the last: its own unfreeze() would make their integers trainable.
    "prism_hadamard_qwen35": {
        "model_type": "prism_hadamard_qwen35", "schema_version": 2, "tensor_namespace": "mlx-vlm-qwen3_5",
        "gdn_activation_layout": "grouped", "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {"path": f"model.layers.{layer}.mlp.{name}", "embedding": False, "dtype": "float16", "block": block}
            for layer in range(3) for name, block in (("gate_proj", 0), ("down_proj", 512))
        ],
        "text_config": {**QWEN, "model_type": "qwen3_5_text", "hidden_size": 128, "intermediate_size": 512},
    },
    "qwen2_vl": {"model_type": "qwen2_vl", "text_config": {**COMMON, "model_type": "qwen2", "num_hidden_layers": 2}},
    "qwen3_vl": {"model_type": "qwen3_vl", "text_config": {**COMMON, "model_type": "qwen3", "num_hidden_layers": 2}},
    "qwen3_vl_moe": {
        "model_type": "qwen3_vl_moe",
        "text_config": {**COMMON, **QWEN_ROUTED, "model_type": "qwen3_moe", "num_hidden_layers": 2},
    },
    "rwkv7": {
        **COMMON, "model_type": "rwkv7", "num_hidden_layers": 3, "norm_eps": 1e-5, "a_low_rank_dim": 8,
        "v_low_rank_dim": 8, "gate_low_rank_dim": 8, "decay_low_rank_dim": 8,
    },
    "youtu_llm": {**LATENT, "model_type": "youtu_llm", "num_hidden_layers": 2, "tie_word_embeddings": True},
    "muse_glimmer": {
        **COMMON, **WINDOWS, "model_type": "muse_glimmer", "post_norm_eps": 1e-8, "qk_scale_factor": 3.87,
        "final_logit_softcapping": 20.0, "output_multiplier": 0.2, "hidden_activation": "silu",
        "layer_rope_theta": [10000.0, 0, 10000.0, 0],
    },
}  # fmt: skip
# name -> the reason why there is no configuration
UNCOVERED: dict[str, str] = {
    "muse_spark": "its attention and experts are Metal kernels without a fallback: [metal_kernel] No Metal back-end.",
    "recurrent_gemma": "its Model never calls nn.Module.__init__, so freeze() and trainable_parameters() raise "
    "AttributeError: 'Model' object has no attribute '_no_grad'",
}
# name -> what fails in mlx_lm itself while the model is trained
FAULTS: dict[str, str] = {
    "deepseek_v41": "no gradients: its router differentiates the experts' indices ([gather_axis] Cannot calculate VJP "
    "with respect to indices), and its rounding of keys to 8 bits has none ([Primitive::vjp] Not implemented for "
    "FromFP8)",
}
