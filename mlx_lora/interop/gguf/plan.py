"""What a GGUF file of a model holds: its architecture, its metadata, and a tensor for every weight.

Names, shapes and forms are those of the table in `models/gguf/names.py`, which importing reads too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_lora.errors import ModelError
from mlx_lora.models.gguf.names import architecture_of
from mlx_lora.models.gguf.rope import FACTORS, LONG, SHORT
from mlx_lora.models.gguf.settings import metadata_of
from mlx_lora.models.gguf.tensors import Architecture, Tensor, layout_of
from mlx_lora.models.open import check_architecture

# What mlx_lm's YaRN computes with where a config.json doesn't say.
YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}


@dataclass(frozen=True)
class Plan:
    """`tensors` are by their MLX paths, in a file's order. `fields` is the metadata of the architecture.

    `extra` has tensors that stand for settings, by name. `tied` says that the embedding is the output head too.
    """

    architecture: str
    tensors: dict[str, list[Tensor]]
    fields: dict[str, Any]
    extra: dict[str, NDArray[np.float32]]
    tied: bool

    def weight(self, path: str) -> Tensor | None:
        """The tensor of the weight of the module at `path`."""
        return next((tensor for tensor in self.tensors.get(path, ()) if tensor.parameter == "weight"), None)

    def __iter__(self) -> Any:
        return (tensor for group in self.tensors.values() for tensor in group)


def plan_of(config: Mapping[str, Any]) -> Plan:
    """The plan for a config.json. Raises ModelError naming an architecture or a setting that GGUF can't say."""
    architecture = architecture_of(config.get("model_type"))
    effective = _effective(config)
    _check(architecture, effective)
    layout = layout_of(architecture, effective)
    tensors: dict[str, list[Tensor]] = {}
    for tensor in layout.values():
        tensors.setdefault(tensor.path, []).append(tensor)
    scaling, extra = _rope(architecture, effective)
    fields = metadata_of(architecture, effective) | scaling
    return Plan(architecture.name, tensors, fields, extra, tied="output" not in layout)


def _effective(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the values that mlx_lm computes with where it leaves some out."""
    _, arguments = check_architecture(dict(config))
    known = vars(arguments.from_dict(dict(config)))
    return {**config, **{key: value for key, value in known.items() if value is not None}}


def _check(architecture: Architecture, config: Mapping[str, Any]) -> None:
    """Raise one ModelError for all settings that a file of this architecture has no place for."""
    faults = [
        f"{key} is {config[key]!r}, not {value!r}"
        for key, value in architecture.fixed.items()
        if config.get(key, value) != value
    ]
    if config.get("rope_traditional"):
        faults.append("rope_traditional rotates neighbours")
    slides = any(setting.key == "sliding_window" for setting in architecture.settings)
    if architecture.name == "llama" and not slides and "sliding_attention" in (config.get("layer_types") or ()):
        faults.append("layer_types has layers with sliding attention")
    if faults:
        raise ModelError(
            f"config.json: {'; '.join(faults)}: a GGUF file of {architecture.name} can't say it",
            hint="`mlx-lora fuse` merges into an MLX model",
        )


def _rope(
    architecture: Architecture, config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """Metadata and tensors for the scaling of rotary positions."""
    name, scaling = architecture.name, config.get("rope_scaling") or {}
    kind = scaling.get("type") or scaling.get("rope_type", "default")
    if kind == "default" or not architecture.scalings:  # MLX's code of the others has no scaling
        return {}, {}
    if kind == "longrope" and kind in architecture.scalings:
        return _longrope(name, config, scaling)
    if kind == "linear":
        return {f"{name}.rope.scaling.type": "linear", f"{name}.rope.scaling.factor": float(scaling["factor"])}, {}
    if kind == "llama3":
        return {}, {FACTORS: _llama3_divisors(config, scaling)}
    own = {key: scaling.get(key, value) for key, value in YARN.items()}
    if kind == "yarn" and (own["mscale"], own["mscale_all_dim"]) == (1.0, 0.0):
        original = scaling.get("original_max_position_embeddings", 4096)
        return {
            f"{name}.rope.scaling.type": "yarn",
            f"{name}.rope.scaling.factor": float(scaling["factor"]),
            f"{name}.rope.scaling.original_context_length": int(original),
            f"{name}.rope.scaling.yarn_beta_fast": float(own["beta_fast"]),
            f"{name}.rope.scaling.yarn_beta_slow": float(own["beta_slow"]),
        }, {}
    raise ModelError(
        f"config.json: rope_scaling {dict(scaling)} has no GGUF form here; known: {', '.join(architecture.scalings)}",
        hint="`mlx-lora fuse` merges into an MLX model",
    )


def _longrope(
    name: str, config: Mapping[str, Any], scaling: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """Phi-3's divisors. MLX takes those for long texts always, so they are written for short ones too."""
    original, positions = scaling["original_max_position_embeddings"], config["max_position_embeddings"]
    divisors = np.asarray(scaling["long_factor"], np.float32)
    fields = {
        f"{name}.rope.scaling.original_context_length": int(original),
        f"{name}.rope.scaling.attn_factor": math.sqrt(1 + math.log(positions / original) / math.log(original)),
    }
    return fields, {LONG: divisors, SHORT: divisors}


def _llama3_divisors(config: Mapping[str, Any], scaling: Mapping[str, Any]) -> NDArray[np.float32]:
    """The divisor of each frequency of a head, (head_dim / 2,): 1 for short waves, `factor` for long ones."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    low, high = scaling.get("low_freq_factor", 1.0), scaling.get("high_freq_factor", 4.0)
    original, factor = scaling.get("original_max_position_embeddings", 8192), float(scaling["factor"])
    waves = 2 * np.pi * float(config.get("rope_theta") or 10000.0) ** (np.arange(0, head, 2) / head)
    smooth = np.clip((original / waves - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth), np.float32)
