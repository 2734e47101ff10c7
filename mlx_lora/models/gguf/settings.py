"""A model's numbers in both directions: config.json to a GGUF file's metadata, and metadata to config.json.

The pairs of keys are the architectures' `settings` in `names.py`. Rope scaling and what MLX can't compute are in
`config.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlx_lora.errors import ModelError
from mlx_lora.models.gguf.header import Fields
from mlx_lora.models.gguf.tensors import Architecture, Setting, attends, sizes_of

_LIMIT = 2**31  # sizes, lengths and frequencies must be below this


def metadata_of(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata "<architecture>.*" of a config.json: sizes, lengths, multipliers and the rotary base.

    Numbers are int or float, LFM2's key heads a list of one number for each layer. Rope scaling, the tokenizer and
    `general.*` are not among them. Raises ModelError for a number that the config lacks.
    """
    sizes, layers = sizes_of(config), config["num_hidden_layers"]
    config = dict(config) | {"intermediate_size": sizes["inner"]}
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    metadata: dict[str, Any] = {}
    for setting in architecture.settings:
        value = _config_value(config, setting)
        if value is None:
            raise ModelError(f"config.json has no {setting.key}, which a GGUF file of {architecture.name} needs")
        metadata[setting.field] = setting.type(value)
    if any(place.layers == "convolution" for place in architecture.layer.values()):
        heads = metadata["attention.head_count_kv"]
        metadata["attention.head_count_kv"] = [heads if attends(config, n) else 0 for n in range(layers)]
    metadata |= {"attention.key_length": sizes["head"], "attention.value_length": sizes["head"]}
    metadata["rope.dimension_count"] = int(sizes["head"] * config.get("partial_rotary_factor", 1.0))
    metadata["vocab_size"] = sizes["vocabulary"]
    return {f"{architecture.name}.{key}": value for key, value in metadata.items()}


def _config_value(config: Mapping[str, Any], setting: Setting) -> Any:
    value = config.get(setting.key)
    if value is None and setting.key == "rope_theta":  # transformers 5 writes it there
        value = (config.get("rope_parameters") or {}).get("rope_theta")
    if value is None:
        value = config.get(setting.default) if isinstance(setting.default, str) else setting.default
    return value


def config_of(architecture: Architecture, fields: Fields) -> dict[str, Any]:
    """The entries of config.json that the architecture's `settings` name, from a file's metadata.

    Raises ModelError for a number that is missing, not positive, or of another type.
    """
    config: dict[str, Any] = {}
    for setting in architecture.settings:
        default = config.get(setting.default) if isinstance(setting.default, str) else setting.default
        config[setting.key] = number(architecture, fields, setting.field, default, setting.type)
    return config


def number(
    architecture: Architecture, fields: Fields, field: str, default: Any = None, kind: type[int] | type[float] = int
) -> Any:
    """A positive number of the architecture; lists of one number for each layer are refused."""
    key = f"{architecture.name}.{field}"
    value = fields.get(key, default)
    if value == default and kind is float and default is not None:
        return float(default)
    if not isinstance(value, kind) or not 0 < value < _LIMIT:
        raise ModelError(f"{key} is {repr(value)[:40]}, not a positive {kind.__name__} that MLX can hold")
    # The shortest decimal number with the same float32 value: 1e-05 instead of 9.999999747378752e-06.
    return float(str(np.float32(value))) if kind is float else value
