"""The only place that knows names of architectures and of their parts."""

from __future__ import annotations

# --- Parts beside the text model: vision, audio, projectors, and heads that predict further tokens ---

_TOWER = ("vision_tower.", "multi_modal_projector.")
_KIMI = (*_TOWER, "vision_model.", "mm_projector.")
_GEMMA4 = (*_TOWER, "audio_tower.", "embed_audio.", "embed_vision.", "vision_embedder.")
_QWEN = ("visual.", "model.visual.", "vision_tower.")

# Beginnings of the names that tensors of these parts have in files, by mlx_lm's module of the architecture. They are
# what its `sanitize` drops, from a model's first files and from those that mlx_lm has written with these parts beside
# them. An architecture that keeps such a part in its own model has no line here.
BESIDE_TEXT: dict[str, tuple[str, ...]] = {
    "gemma3": _TOWER,
    "gemma3n": ("model.vision_tower.", "model.audio_tower.", "model.embed_vision.", "model.embed_audio."),
    "gemma4": (*_GEMMA4, *(f"model.{prefix}" for prefix in _GEMMA4)),
    "kimi_k25": _KIMI,
    "kimi_k3": _KIMI,
    "kimi_vl": _TOWER,
    "lfm2-vl": _TOWER,
    "llama4": ("vision_model.", "multi_modal_projector."),
    "minimax_m3_vl": (*_TOWER, "patch_merge_mlp."),
    "mistral3": (*_TOWER, *(f"model.{prefix}" for prefix in _TOWER)),
    "muse_glimmer": ("vision_tower.", "vision_adapter.", "vision_projection."),
    "pixtral": _TOWER,
    "prism_hadamard_qwen35": ("model.visual.", "vision_tower."),
    "qwen2_vl": _QWEN,
    "qwen3_5": ("model.visual.", "vision_tower."),
    "qwen3_5_moe": ("model.visual.", "vision_tower."),
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
}

# Where mlx_lm drops a part by this name from files of its own, and by the published one only from published files.
# mlx_vlm knows both.
BESIDE_TEXT_RENAMED: dict[str, dict[str, str]] = {
    "qwen2_vl": {"model.visual.": "vision_tower.", "visual.": "vision_tower."},
    "qwen3_vl": {"model.visual.": "vision_tower.", "visual.": "vision_tower."},
    "qwen3_vl_moe": {"model.visual.": "vision_tower.", "visual.": "vision_tower."},
}

# (embedding, head): tied in mlx_lm, while mlx_vlm has a head of its own, which it takes from packed embeddings only
# where the files hold the head's scales too.
HEADS_APART: dict[str, tuple[str, str]] = {"gemma3": ("language_model.model.embed_tokens", "language_model.lm_head")}

# Heads that predict several tokens ahead from the hidden states of the model they were trained with: stale once it
# has changed. Heads that lie among the layers (num_nextn_predict_layers) are left to mlx_lm.
STALE_HEADS = (
    "mtp.", "model.mtp.", "model.mtp_layers.", "model.mtp_block.", "model.mtp_linear_proj.", "model.mtp_hidden_norm.",
    "model.mtp_emb_norm.", "model.language_model.mtp.", "language_model.mtp.", "language_model.model.mtp.",
)  # fmt: skip
