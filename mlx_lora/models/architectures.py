"""The only place that knows what mlx_lm calls the parts of its models.

Tables of names, each with the functions that read it. A module is known by its path, and by the names of the classes
on that path: one name may mean different things in two models (`mixer`, `gate`, `conv`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import mlx.nn as nn

# ---- The trunk: what makes hidden states of tokens ----

# Its names, of which a model has one.
TRUNKS = ("model", "backbone", "transformer")

# Settings of config.json that say how many rows the embedding has; phixtral has a name of its own.
VOCABULARY_SIZES = ("vocab_size", "num_vocab")

# ---- Token mixers and routers: what `adapter.targets` means by attention and by all-linear ----

Modules = Mapping[str, nn.Module]

# Attribute names of attention, whatever its class is called.
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
# Attribute and class names of what mixes tokens. Those of the classes tell where an attribute's name doesn't: `mixer`
# is a state space, attention, an MLP or experts (nemotron_h, plamo2), `conv` a short convolution with projections
# (lfm2), `temporal_block` a recurrence or attention (recurrent_gemma). rwkv7's channel mixing is its MLP.
MIXERS = re.compile(r"attn|attention|mamba|mla$|kda$|timemixing|recurrentblock|shortconv$|delta(net|attention)", re.I)
MIXER_CLASSES = re.compile(MIXERS.pattern + r"|mixer$", re.I)
# A linear that stands where attention was: it looks at one token only (nemotron-nas).
NO_MIXERS = {"LinearSubblockReplacement"}
# Projections of attention that lie in the layer itself (olmo).
LOOSE_PROJECTIONS = {"att_proj", "attn_out"}

# What chooses experts, or the keys that attention looks at (deepseek_v32, deepseek_v41, glm_moe_dsa, minimax_m3_vl).
# What they compute goes through a choice, so the loss has no gradient for them or one that unbalances the experts.
ROUTERS = {"router", "modality_router", "indexer", "index_q_proj", "index_k_proj"}
# These are routers beside experts only: anywhere else a `gate` is part of an MLP or of attention. `coefficient` weighs
# Klear's shared experts against the chosen ones.
ROUTERS_OF_EXPERTS = {"gate", "shared_expert_gate", "coefficient"}
EXPERTS = {"experts", "switch_mlp", "switch_glu"}

# By module of mlx_lm: layers whose weight the model reads itself. A wrapper in their place would never be called.
READ_BY_THE_MODEL = {
    "gemma3n": {"prediction_coefs", "correction_coefs"},
    "kimi_k3": {"self_attention_res_proj", "mlp_res_proj", "output_attn_res_proj"},
    "muse_spark": {"lm_head", "position_embedding_table"},
}
# These do so where the output head is the embedding's own.
READ_WHEN_TIED = {"llama4_text", "minicpm", "seed_oss"}
# Linears whose output is a list of parts (afm7).
SPLITTING = {"FusedLinear", "FusedQuantizedLinear"}


# Mixers that carry a state along the row in a loop of mlx_lm's own while they train, by their class.
OWN_LOOPS = {"MambaBlock", "JambaMambaMixer", "Rwkv7TimeMixing", "RecurrentBlock"}


def mixes_tokens(path: str, layer: str, modules: Modules) -> bool:
    """Whether the linear at `path`, inside the transformer block whose path begins with `layer`, is part of a mixer."""
    blocks = list(_inside(path, layer))
    *above, (_, name) = blocks
    if name in LOOSE_PROJECTIONS and not above:
        return True
    classes = [type(modules[block]).__name__ if block in modules else "" for block, _ in above]
    if NO_MIXERS.intersection(classes):
        return False
    return any(MIXERS.search(name) for _, name in above) or any(map(MIXER_CLASSES.search, classes))


def routes(path: str, layer: str, modules: Modules) -> bool:
    """Whether the module at `path` chooses experts or keys, rather than transforming activations."""
    for block, name in _inside(path, layer):
        parent = block.rpartition(".")[0]
        if name in ROUTERS or (name in ROUTERS_OF_EXPERTS and _holds_experts(parent, modules)):
            return True
    return False


def unwrappable(path: str, model: nn.Module, modules: Modules) -> str | None:
    """Why a wrapper in the place of the module at `path` would not do what it says, or None."""
    parent, _, name = path.rpartition(".")
    if type(modules[path]).__name__ in SPLITTING:
        return f"{path} gives its output in parts, a {type(modules[path]).__name__}, and can't be wrapped"
    home = type(modules.get(parent, model)).__module__.rpartition(".")[2]
    tied = getattr(getattr(model, "args", None), "tie_word_embeddings", True)
    if name in READ_BY_THE_MODEL.get(home, ()) or (home in READ_WHEN_TIED and name == "embed_tokens" and tied):
        return f"{path}: the model reads its weight without calling it, and would never call a wrapper"
    return None


def _holds_experts(block: str, modules: Modules) -> bool:
    prefix = f"{block}." if block else ""
    return any(f"{prefix}{name}" in modules or f"{prefix}{name}.0" in modules for name in EXPERTS)


def _inside(path: str, layer: str) -> list[tuple[str, str]]:
    """(path, name) of every module on the way from the transformer block down to `path`, which is the last."""
    names = path.removeprefix(layer).split(".")
    return [(layer + ".".join(names[: count + 1]), name) for count, name in enumerate(names)]


# ---- Parts beside the text model: vision, audio, projectors, and heads that predict further tokens ----

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
