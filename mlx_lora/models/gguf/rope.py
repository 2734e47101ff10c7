"""The rotary embedding's scaling in a GGUF file as `rope_scaling` of config.json, or a refusal."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mlx_lora.errors import ModelError
from mlx_lora.models.gguf.header import Fields
from mlx_lora.models.gguf.tensors import Architecture, Array

FACTORS = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"


def rope_scaling(
    architecture: Architecture, fields: Fields, config: dict[str, Any], factors: dict[str, Array]
) -> dict[str, Any] | None:
    """The `rope_scaling` of config.json, None for no scaling; ModelError if MLX can't rotate as llama.cpp does.

    `config` needs `head_dim`, `rope_theta` and `max_position_embeddings`; `factors` are the file's tensors FACTORS,
    LONG and SHORT, as far as it has them.
    """
    scaling = _scaling(architecture, fields, config, factors)
    if scaling and scaling["rope_type"] not in architecture.scalings:
        known = ", ".join(architecture.scalings) or "none"
        raise ModelError(f"MLX's {config['model_type']} lacks rope scaling {scaling['rope_type']}; known: {known}")
    return scaling


def _scaling(
    architecture: Architecture, fields: Fields, config: dict[str, Any], factors: dict[str, Array]
) -> dict[str, Any] | None:
    rope = f"{architecture.name}.rope"
    kind = fields.get(f"{rope}.scaling.type", "linear")
    factor = fields.get(f"{rope}.scaling.factor") or fields.get(f"{rope}.scale_linear") or 1.0
    divisors = factors.get(FACTORS, np.ones(1, np.float32))
    plain = bool(np.all(divisors == 1.0))
    if LONG in factors or SHORT in factors:
        return _longrope(architecture, fields, config, factors)
    refused_unless_one = ("attn_factor", "yarn_attn_factor", "yarn_ext_factor")
    if all(fields.get(f"{rope}.scaling.{name}", 1.0) == 1.0 for name in refused_unless_one):
        if kind == "none" or (kind in ("linear", "yarn") and factor == 1.0):
            return None if plain else _llama3(config, divisors)
        if kind == "linear" and plain:
            return {"rope_type": "linear", "factor": float(factor)}
        if kind == "yarn" and plain:
            original = fields.get(f"{rope}.scaling.original_context_length", config["max_position_embeddings"])
            fast = fields.get(f"{rope}.scaling.yarn_beta_fast", 32.0)
            slow = fields.get(f"{rope}.scaling.yarn_beta_slow", 1.0)
            limits = {"original_max_position_embeddings": original, "beta_fast": fast, "beta_slow": slow}
            return {"rope_type": "yarn", "factor": float(factor), **limits}
    settings = {key.partition(".")[2]: value for key, value in fields.items() if ".rope.scal" in key}
    with_factors = "" if plain else f" with {FACTORS}"
    known = ", ".join(architecture.scalings) or "none"
    raise ModelError(f"this rope scaling is not supported: {settings}{with_factors}; known: {known}")


def _llama3(config: dict[str, Any], factors: Array) -> dict[str, Any]:
    """Llama 3's rope settings; the file holds the divisor of each frequency in their place.

    The divisor is 1 for short waves, `factor` for long ones, and between them 1 / ((1-s)/factor + s) with
    s = (original/wave - low) / (high - low). All published models have low 1, high 4 and original 8192. Divisors of
    other settings differ from those of these three numbers, and are refused.
    """
    low, high, original, factor = 1.0, 4.0, 8192, float(factors.max())
    if factors.shape != (config["head_dim"] // 2,) or not np.isfinite(factors).all() or factor <= 0:
        raise ModelError(f"{FACTORS} is not one positive divisor for each frequency")
    exponents = np.arange(0, config["head_dim"], 2) / config["head_dim"]
    waves = 2 * np.pi * config["rope_theta"] ** exponents
    smooth = np.clip((original / waves - low) / (high - low), 0, 1)
    if not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-5):
        raise ModelError(f"{FACTORS} is not Llama 3's rope scaling, and MLX's llama has no place for another")
    limits = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}
    return {"rope_type": "llama3", "factor": factor, **limits}


def _longrope(
    architecture: Architecture, fields: Fields, config: dict[str, Any], factors: dict[str, Array]
) -> dict[str, Any]:
    """Phi-3's divisors for long and short texts; MLX always takes the long ones, llama.cpp by its context's length.

    Both multiply q and k by the same factor, which MLX computes from the two context lengths and a file states.
    """
    rope, positions = f"{architecture.name}.rope.scaling", config["max_position_embeddings"]
    original = fields.get(f"{rope}.original_context_length", 0)
    count = round(config["head_dim"] * config.get("partial_rotary_factor", 1.0)) // 2
    faults = [
        name
        for name in (LONG, SHORT)
        if name not in factors or factors[name].shape != (count,) or not (factors[name] > 0).all()
        or not np.isfinite(factors[name]).all()
    ]  # fmt: skip
    if faults or FACTORS in factors:
        raise ModelError(f"{', '.join(faults or [FACTORS])}: not one positive divisor for each of {count} frequencies")
    if not isinstance(original, int) or not 1 < original <= positions:
        raise ModelError(f"{rope}.original_context_length is {original}, not in 2 … {positions}")
    expected = math.sqrt(1 + math.log(positions / original) / math.log(original))
    stated = fields.get(f"{rope}.attn_factor", 1.0)
    if fields.get(f"{rope}.type", "longrope") not in ("longrope", "none") or fields.get(f"{rope}.factor", 1.0) != 1.0:
        raise ModelError(f"{rope} has another scaling beside {LONG}")
    if not math.isclose(stated, expected, rel_tol=1e-5):
        raise ModelError(f"{rope}.attn_factor is {stated}; MLX multiplies by {expected:.6f} with these context lengths")
    shown = {name: [float(str(value)) for value in factors[key]] for name, key in
             (("long_factor", LONG), ("short_factor", SHORT))}  # fmt: skip
    return {"type": "longrope", "rope_type": "longrope", "original_max_position_embeddings": original, **shown}
