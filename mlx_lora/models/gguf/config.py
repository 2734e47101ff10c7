"""config.json of a GGUF file's model: architecture, settings, and a check of all names and shapes of tensors.

Every part is either understood or refused by name. Metadata that isn't known here is left out and named in a note.
Tensors' values are read in `convert.py`, except the rotary factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gguf import GGMLQuantizationType as Kind

from mlx_lora.errors import ModelError
from mlx_lora.models.gguf import rope
from mlx_lora.models.gguf.header import Fields
from mlx_lora.models.gguf.names import architecture_named
from mlx_lora.models.gguf.reader import Source, Tensors
from mlx_lora.models.gguf.settings import config_of, number
from mlx_lora.models.gguf.tensors import Architecture, Layout

# Settings that change what a model computes; an architecture that has one lists it in its own settings.
_REFUSED = (
    "attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias", "attention.sliding_window",
    "attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "residual_scale", "embedding_scale",
    "use_parallel_residual", "rope.scaling.alpha", "rope.scaling.yarn_log_multiplier", "expert_shared_count",
    "expert_group_count", "leading_dense_block_count", "expert_shared_feed_forward_length", "expert_gating_func",
)  # fmt: skip
_UNDERSTOOD = (
    "attention.key_length", "attention.value_length", "rope.dimension_count", "vocab_size", "feed_forward_length",
    "attention.causal", "expert_count", "rope.scale_linear", "rope.freq_base_swa", "attention.sliding_window_pattern",
)  # fmt: skip
# Prefixes of keys that describe a file, or that the tokenizer's conversion reads.
_DESCRIPTIONS = ("general.", "tokenizer.", "split.", "GGUF.")
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
_FACTORS = (rope.FACTORS, rope.LONG, rope.SHORT)


def check_kind(source: Source) -> Architecture:
    """The architecture of a file that is one model; ModelError for another file or settings that MLX lacks."""
    fields = source.fields
    if (kind := fields.get("general.type", "model")) != "model":
        raise ModelError(f"the file is of type {kind!r}, not a model")
    architecture = architecture_named(fields.get("general.architecture"))
    name = architecture.name
    own = {setting.field for setting in architecture.settings} | set(architecture.ignored)
    if not fields.get(f"{name}.attention.causal", True):
        raise ModelError("attention in both directions is not supported")
    experts = fields.get(f"{name}.expert_count") or any("_exps." in tensor for tensor in source.tensors)
    if experts and "expert_count" not in own:
        raise ModelError(f"mixture of experts is not supported for {name}")
    if refused := [field for field in _REFUSED if fields.get(f"{name}.{field}") and field not in own]:
        raise ModelError(f"the model needs settings that MLX's {name} lacks: {', '.join(refused)}")
    if fields.get(f"{name}.expert_weights_scale", 1.0) not in (0.0, 1.0):
        raise ModelError(f"the model needs settings that MLX's {name} lacks: expert_weights_scale")
    if name == "granite" and not fields.get("granite.rope.scaling.finetuned", True):
        raise ModelError("granite without rotary embedding is not supported")
    base = fields.get(f"{name}.rope.freq_base", 10000.0)
    if fields.get(f"{name}.rope.freq_base_swa", base) != base and "rope.freq_base_swa" not in own:
        raise ModelError(f"the model needs settings that MLX's {name} lacks: rope.freq_base_swa")
    return architecture


def unknown_keys(architecture: Architecture, fields: Fields) -> list[str]:
    """Metadata keys that the import leaves out, such as those of an importance matrix."""
    own = {setting.field for setting in architecture.settings} | set(architecture.ignored) | set(_UNDERSTOOD)
    known = {f"{architecture.name}.{field}" for field in (*own, *_REFUSED, "expert_weights_scale")}
    prefixes = (*_DESCRIPTIONS, f"{architecture.name}.rope.scaling.")
    templates = [key for key in fields if key.startswith("tokenizer.chat_template.")]  # beside the default one
    return [key for key in fields if key not in known and not key.startswith(prefixes)] + templates


def read_config(architecture: Architecture, source: Source) -> dict[str, Any]:
    """config.json for mlx_lm, from the metadata and the embedding's shape.

    Takes the rotary factors out of `source.tensors`. Raises ModelError for settings that are missing, out of range or
    don't fit together.
    """
    fields, tensors = source.fields, source.tensors
    factors = {name: tensors.pop(name).data for name in _FACTORS if name in tensors}
    flat = _without_layers(architecture, fields)
    config: dict[str, Any] = {
        "model_type": architecture.model_types[0],
        "architectures": [architecture.transformers_class],
        **config_of(architecture, flat),
        **architecture.fixed,
    }
    if config["num_hidden_layers"] > len(tensors) or "token_embd.weight" not in tensors:
        layers = config["num_hidden_layers"]
        raise ModelError(f"the file's {len(tensors)} tensors are too few for {layers} layers and an embedding")
    _check_heads(architecture, flat, config)
    config["vocab_size"] = tensors["token_embd.weight"].shape[0]
    if len(fields.get("tokenizer.ggml.tokens") or []) > config["vocab_size"]:
        raise ModelError(f"the file names more tokens than its embedding's {config['vocab_size']} rows")
    if any(place.bias == "optional" for place in architecture.layer.values()):
        biased = [name for name in tensors if name.endswith(".bias")]
        config["attention_bias"] = any(".attn_" in name for name in biased)
        config["mlp_bias"] = any(".ffn_" in name for name in biased)
    tied = "output.weight" not in tensors
    config["tie_word_embeddings"] = tied if architecture.head == "optional" else architecture.tied
    if scaling := rope.rope_scaling(architecture, fields, config, factors):
        config["rope_scaling"] = scaling
    return config | _special(architecture, fields, config)


def _without_layers(architecture: Architecture, fields: Fields) -> Fields:
    """The metadata with one number where a file has one for each layer, and that an import understands."""
    fields, name = dict(fields), architecture.name
    key = f"{name}.attention.head_count_kv"
    if name == "lfm2" and isinstance(heads := fields.get(key), list):
        numbers = {count for count in heads if count}
        fields[key] = numbers.pop() if len(numbers) == 1 else heads
    pattern = f"{name}.attention.sliding_window_pattern"
    if isinstance(windows := fields.get(pattern), list):
        period = windows.index(False) + 1 if False in windows else 0
        alternates = [bool(window) for window in windows] == [
            (n + 1) % max(period, 1) != 0 for n in range(len(windows))
        ]
        fields[pattern] = period if alternates else windows
    return fields


def _check_heads(architecture: Architecture, fields: Fields, config: dict[str, Any]) -> None:
    """Add `head_dim`, and phi3's share of a head that rotates, to the config; ModelError if sizes don't fit."""
    name = architecture.name
    hidden, heads, keys = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head = number(architecture, fields, "attention.key_length", hidden // heads)
    if heads % keys or head % 2:
        raise ModelError(f"{heads} heads, {keys} key heads and {head} values a head don't fit together")
    if not architecture.own_head_dim and head * heads != hidden:
        raise ModelError(f"{name}.attention.key_length {head} is not the hidden size {hidden} / {heads} heads")
    if (size := number(architecture, fields, "attention.value_length", head)) != head:
        raise ModelError(f"{name}.attention.value_length {size} differs from the head size {head}, which MLX lacks")
    turned = number(architecture, fields, "rope.dimension_count", head)
    if name == "phi3" and turned < head and turned % 2 == 0:
        config["partial_rotary_factor"] = turned / head
    elif turned != head:
        raise ModelError(f"{name}.rope.dimension_count {turned} differs from the head size {head}, which MLX lacks")
    config["head_dim"] = head


def _special(architecture: Architecture, fields: Fields, config: dict[str, Any]) -> dict[str, Any]:
    """What single architectures need beside their settings; ModelError for what MLX's own code can't do."""
    name, layers = architecture.name, config["num_hidden_layers"]
    if name in _LAYERS_OF_27B:  # llama.cpp scales the queries of the largest model by another size
        largest = layers == _LAYERS_OF_27B[name]
        shared = config["hidden_size"] // config["num_attention_heads"]
        scale = {"query_pre_attn_scalar": shared if largest else config["head_dim"]}
        if name == "gemma3" and layers < config["sliding_window_pattern"]:
            pattern = config["sliding_window_pattern"]
            raise ModelError(f"{layers} layers are fewer than the {pattern} of gemma3.attention.sliding_window_pattern")
        return scale
    if name == "granite" and not config["attention_multiplier"]:
        return {"attention_multiplier": config["head_dim"] ** -0.5}
    if name == "phi3" and "rope_scaling" in config:
        return {"original_max_position_embeddings": config["rope_scaling"]["original_max_position_embeddings"]}
    if name == "gpt-oss":
        return {"layer_types": _windows(fields.get("gpt-oss.attention.sliding_window_pattern", 2), layers)}
    if name == "lfm2":
        heads = fields.get("lfm2.attention.head_count_kv")
        counts = heads if isinstance(heads, list) else [heads] * layers
        if len(counts) != layers or not any(counts):
            raise ModelError(
                f"lfm2.attention.head_count_kv names {len(counts)} layers, {sum(map(bool, counts))} with heads"
            )
        types = ["full_attention" if count else "conv" for count in counts]
        sizes = {"block_dim": config["hidden_size"], "block_ff_dim": config["intermediate_size"]}
        return {"layer_types": types, **sizes}
    return {}


def _windows(pattern: int | Sequence[bool], layers: int) -> list[str]:
    """Which layers of gpt-oss see a window only: all but each n-th of a pattern n, or a list with one flag a layer."""
    if isinstance(pattern, int):
        pattern = [pattern == 0 or n % pattern < pattern - 1 for n in range(layers)]
    if len(pattern) != layers or all(pattern) or not any(pattern):
        raise ModelError("gpt-oss.attention.sliding_window_pattern: MLX needs layers with a window and layers without")
    return ["sliding_attention" if windowed else "full_attention" for windowed in pattern]


def check_tensors(tensors: Tensors, layout: Layout, packed: Sequence[Kind]) -> None:
    """Raise a ModelError for all tensors that are missing, unknown, of a wrong shape, or vectors in a `packed` type."""
    faults = []
    for name, expected in layout.items():
        faults += [] if f"{name}.weight" in tensors else [f"{name}.weight is missing"]
        faults += [f"{name}.bias is missing"] if expected.bias == "always" and f"{name}.bias" not in tensors else []
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition(".")
        known = layout.get(stem)
        if known is None or part not in ("weight", "bias") or (part == "bias" and known.bias == "never"):
            faults.append(f"{name} is unknown")
        elif tensor.shape != (right := known.shape if part == "weight" else known.shape[:-1]):
            faults.append(f"{name} has shape {tensor.shape}, not {right}")
        elif known.kind not in ("linear", "embedding", "experts") and tensor.kind in packed:
            faults.append(f"{name} is a {known.kind} in {tensor.kind.name}")
        elif part == "bias" and tensor.kind in packed:
            faults.append(f"{name} is a vector in {tensor.kind.name}")
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ModelError(f"the file's tensors are not those of its architecture: {'; '.join(faults[:5])}{more}")
