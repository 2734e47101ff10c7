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
    "lfm2": {
        **COMMON, "model_type": "lfm2", "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"],
        "norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "block_dim": 64, "block_ff_dim": 128,
        "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": True,
    },
    "granitemoehybrid": {
        **COMMON, "model_type": "granitemoehybrid", "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"], "position_embedding_type": "nope", "logits_scaling": 4.0,
        "attention_multiplier": 0.25, "embedding_multiplier": 12.0, "residual_multiplier": 0.5, "mlp_bias": False,
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64, "mamba_n_heads": 4,
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
    "deepseek_v32": {
        **DEEPSEEK, "model_type": "deepseek_v32", "index_head_dim": 16, "index_n_heads": 2, "index_topk": 4,
    },
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
}  # fmt: skip
# name -> the reason why there is no configuration
UNCOVERED: dict[str, str] = {}
# name -> what fails in mlx_lm itself
FAULTS: dict[str, str] = {}
