"""Check a GGUF file and read its model's configuration: metadata, architecture, settings, names and shapes of tensors.

Every part is either understood or refused by name. Tensors' values are read in `convert.py`, except the rotary factors.
"""

from __future__ import annotations

import math
import mmap
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Kind

from mlx_lora import files
from mlx_lora.errors import ModelError
from mlx_lora.models.gguf.header import check_header

ARCHITECTURE = "llama"
ENDINGS = (".gguf", "")  # some programs store such files without an ending
ROPE_FACTORS = "rope_freqs.weight"
# Bits of the types that MLX's affine mode represents without loss.
BITS = {Kind.Q4_0: 4, Kind.Q4_1: 4, Kind.Q8_0: 8}
# Settings that change what a model computes and that MLX's llama doesn't have.
_REFUSED = (
    "attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias", "attention.sliding_window",
    "attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "residual_scale", "embedding_scale",
    "use_parallel_residual", "rope.scaling.alpha", "rope.scaling.yarn_log_multiplier",
)  # fmt: skip
# Required types of the metadata keys that are used here, because the format allows any type for any key.
_TEXTS = (
    "general.architecture", "general.type", "llama.rope.scaling.type",
    "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template",
)  # fmt: skip
_LISTS = {
    "tokenizer.ggml.tokens": str, "tokenizer.ggml.merges": str,
    "tokenizer.ggml.token_type": int, "tokenizer.ggml.scores": float,
}  # fmt: skip
_INTEGERS = re.compile(r"split\.count|tokenizer\.ggml\.\w+_token_id")
_NUMBERS = re.compile(r"llama\.rope\.(scaling\.(?!type$).+|scale_linear)")
_LIMIT = 2**31  # sizes, lengths and frequencies must be below this

Fields = dict[str, Any]
Layout = dict[str, tuple[str, tuple[int, ...]]]
Tensors = dict[str, gguf.ReaderTensor]
Array = npt.NDArray[Any]


def open_gguf(file: Path) -> tuple[gguf.GGUFReader, Fields]:
    """gguf's reader for the file, and its metadata; ModelError unless it is a complete GGUF file."""
    try:
        if fault := files.fault(file):
            raise ModelError(f"{file}: not a GGUF file, it {fault}")
        if file.suffix not in ENDINGS:
            raise ModelError(f"{file}: not a GGUF file by its name", hint="give it the ending .gguf, if it is one")
        with open(file, "rb") as handle:
            if handle.read(4) != b"GGUF":
                raise ModelError(f"{file}: not a GGUF file")
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
                check_header(data)
        reader = gguf.GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, LookupError, ValueError, OverflowError, TypeError) as error:  # gguf's reader on a damaged file
        raise ModelError(f"{file}: truncated or damaged GGUF file ({error})", hint="get the file again") from error
    check_types(fields)
    return reader, fields


def check_types(fields: Fields) -> None:
    """Raise one ModelError for all keys used here whose values have a wrong type."""
    faults = []
    for key, value in fields.items():
        if key in _TEXTS:
            fits = isinstance(value, str)
        elif key in _LISTS:
            fits = isinstance(value, list) and all(isinstance(element, _LISTS[key]) for element in value)
        elif _INTEGERS.fullmatch(key):
            fits = isinstance(value, int)
        else:
            fits = isinstance(value, int | float) and math.isfinite(value) if _NUMBERS.fullmatch(key) else True
        faults += [] if fits else [key]
    if faults:
        raise ModelError(f"the file's metadata has values of the wrong type: {', '.join(faults[:5])}")


def check_kind(fields: Fields, tensors: Tensors) -> None:
    """Raise ModelError unless the file is one complete model of a known architecture."""
    if (kind := fields.get("general.type", "model")) != "model":
        raise ModelError(f"the file is of type {kind!r}, not a model")
    if (architecture := fields.get("general.architecture")) != ARCHITECTURE:
        known = f"{ARCHITECTURE} (Llama, Mistral, SmolLM)"
        raise ModelError(f"GGUF architecture {architecture!r} is not supported; known: {known}")
    if (parts := fields.get("split.count", 1)) > 1:
        raise ModelError(f"the file is one of {parts} parts", hint="join them first: llama-gguf-split --merge")
    if not fields.get("llama.attention.causal", True):
        raise ModelError("attention in both directions is not supported")
    if fields.get("llama.expert_count") or any("_exps." in name for name in tensors):
        raise ModelError("mixture of experts is not supported yet")
    if refused := [name for name in _REFUSED if fields.get(f"llama.{name}")]:
        raise ModelError(f"the model needs settings that MLX's llama lacks: {', '.join(refused)}")


def read_config(fields: Fields, tensors: Tensors, factors: gguf.ReaderTensor | None) -> dict[str, Any]:
    """config.json for mlx_lm's llama, from the `llama.*` metadata and the embedding's shape."""
    hidden, heads = _setting(fields, "embedding_length"), _setting(fields, "attention.head_count")
    kv_heads = _setting(fields, "attention.head_count_kv", heads)
    head_dim = _setting(fields, "attention.key_length", hidden // heads)
    layers = _setting(fields, "block_count")
    if layers > len(tensors) or "token_embd.weight" not in tensors:
        raise ModelError(f"the file's {len(tensors)} tensors are too few for {layers} layers and an embedding")
    if heads % kv_heads or head_dim % 2:
        raise ModelError(f"{heads} heads, {kv_heads} key heads and {head_dim} values a head don't fit together")
    for key in ("attention.value_length", "rope.dimension_count"):
        if (size := _setting(fields, key, head_dim)) != head_dim:
            raise ModelError(f"llama.{key} {size} differs from the head size {head_dim}, which MLX's llama lacks")
    vocabulary = int(tensors["token_embd.weight"].shape[-1])
    if len(fields.get("tokenizer.ggml.tokens") or []) > vocabulary:
        raise ModelError(f"the file names more tokens than its embedding's {vocabulary} rows")
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": _setting(fields, "feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "max_position_embeddings": _setting(fields, "context_length"),
        "rms_norm_eps": _setting(fields, "attention.layer_norm_rms_epsilon", kind=float),
        "rope_theta": _setting(fields, "rope.freq_base", 10000.0, kind=float),
        "attention_bias": any(".attn_" in name and name.endswith(".bias") for name in tensors),
        "mlp_bias": any(".ffn_" in name and name.endswith(".bias") for name in tensors),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if scaling := _rope_scaling(fields, config, np.ones(1) if factors is None else factors.data):
        config["rope_scaling"] = scaling
    return config


def _setting(fields: Fields, key: str, default: Any = None, *, kind: type[int] | type[float] = int) -> Any:
    """A positive number of the architecture; lists of one number for each layer are refused."""
    value = fields.get(f"llama.{key}", default)
    if not isinstance(value, kind) or not 0 < value < _LIMIT:
        raise ModelError(f"llama.{key} is {repr(value)[:40]}, not a positive {kind.__name__} that MLX can hold")
    # The shortest decimal number with the same float32 value: 1e-05 instead of 9.999999747378752e-06.
    return float(str(np.float32(value))) if kind is float else value


def _rope_scaling(fields: Fields, config: dict[str, Any], factors: Array) -> dict[str, Any] | None:
    """The `rope_scaling` of config.json, None for no scaling; ModelError if MLX can't rotate as llama.cpp does."""
    kind = fields.get("llama.rope.scaling.type", "linear")
    factor = fields.get("llama.rope.scaling.factor") or fields.get("llama.rope.scale_linear") or 1.0
    refused_unless_one = ("attn_factor", "yarn_attn_factor", "yarn_ext_factor")
    if all(fields.get(f"llama.rope.scaling.{name}", 1.0) == 1.0 for name in refused_unless_one):
        if kind == "none" or (kind in ("linear", "yarn") and factor == 1.0):
            return None if np.all(factors == 1.0) else _llama3_scaling(config, factors)
        if kind == "linear" and np.all(factors == 1.0):
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn" and np.all(factors == 1.0):
            original = fields.get("llama.rope.scaling.original_context_length", config["max_position_embeddings"])
            fast = fields.get("llama.rope.scaling.yarn_beta_fast", 32.0)
            slow = fields.get("llama.rope.scaling.yarn_beta_slow", 1.0)
            limits = {"original_max_position_embeddings": original, "beta_fast": fast, "beta_slow": slow}
            return {"rope_type": "yarn", "factor": factor, **limits}
    settings = {key.removeprefix("llama."): value for key, value in fields.items() if ".rope.scal" in key}
    with_factors = "" if np.all(factors == 1.0) else f" with {ROPE_FACTORS}"
    raise ModelError(f"this rope scaling is not supported: {settings}{with_factors}; known: linear, yarn, llama3")


def _llama3_scaling(config: dict[str, Any], factors: Array) -> dict[str, Any]:
    """Llama 3's rope settings; the file holds the divisor of each frequency in their place.

    The divisor is 1 for short waves, `factor` for long ones, and between them 1 / ((1-s)/factor + s) with
    s = (original/wave - low) / (high - low). All published models have low 1, high 4 and original 8192. Divisors of
    other settings differ from those of these three numbers, and are refused.
    """
    low, high, original, factor = 1.0, 4.0, 8192, float(factors.max())
    if factors.shape != (config["head_dim"] // 2,) or not np.isfinite(factors).all() or factor <= 0:
        raise ModelError(f"{ROPE_FACTORS} is not one positive divisor for each frequency")
    exponents = np.arange(0, config["head_dim"], 2) / config["head_dim"]
    waves = 2 * np.pi * config["rope_theta"] ** exponents
    smooth = np.clip((original / waves - low) / (high - low), 0, 1)
    if not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-5):
        raise ModelError(f"{ROPE_FACTORS} is not Llama 3's rope scaling, and MLX's llama has no place for another")
    limits = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}
    return {"rope_type": "llama3", "factor": factor, **limits}


def layout_of(config: dict[str, Any]) -> Layout:
    """Maps a tensor's name in the file, without `.weight`, to its path in MLX and the shape of its weight."""
    hidden, inner, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    block: Layout = {
        "attn_norm": ("input_layernorm", (hidden,)),
        "attn_q": ("self_attn.q_proj", (queries, hidden)),
        "attn_k": ("self_attn.k_proj", (keys, hidden)),
        "attn_v": ("self_attn.v_proj", (keys, hidden)),
        "attn_output": ("self_attn.o_proj", (hidden, queries)),
        "ffn_norm": ("post_attention_layernorm", (hidden,)),
        "ffn_gate": ("mlp.gate_proj", (inner, hidden)),
        "ffn_up": ("mlp.up_proj", (inner, hidden)),
        "ffn_down": ("mlp.down_proj", (hidden, inner)),
    }
    layout: Layout = {"token_embd": ("model.embed_tokens", (rows, hidden)), "output_norm": ("model.norm", (hidden,))}
    if not config["tie_word_embeddings"]:
        layout["output"] = ("lm_head", (rows, hidden))
    for n in range(config["num_hidden_layers"]):
        layout |= {f"blk.{n}.{name}": (f"model.layers.{n}.{path}", shape) for name, (path, shape) in block.items()}
    return layout


def check_tensors(tensors: Tensors, layout: Layout) -> None:
    """Raise one ModelError for all tensors that are missing, unknown, of a wrong shape, or quantized vectors."""
    faults = [f"{stem}.weight is missing" for stem in layout if f"{stem}.weight" not in tensors]
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition(".")
        shape = tuple(int(size) for size in reversed(tensor.shape))
        expected = layout.get(stem, ("", ()))[1]
        if part == "bias":
            expected = expected[:1] if stem.startswith("blk.") and len(expected) == 2 else ()
        if not expected or part not in ("weight", "bias"):
            faults.append(f"{name} is unknown")
        elif shape != expected:
            faults.append(f"{name} has shape {shape}, not {expected}")
        elif len(shape) == 1 and tensor.tensor_type in BITS:
            faults.append(f"{name} is a vector in {tensor.tensor_type.name}")
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ModelError(f"the file's tensors are not those of its architecture: {'; '.join(faults[:5])}{more}")
