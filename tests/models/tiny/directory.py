"""A tiny model of any architecture as a directory that commands can be run on, with a byte-level tokenizer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora.models import SwitchLinear
from tests.conftest import VOCABULARY, write_tokenizer
from tests.models.tiny.build import build

EXPERTS = {"mode": "mxfp4", "bits": 4, "group_size": 32}


def write_directory(path: Path, name: str, config: dict[str, Any], *, packed_experts: bool = False) -> Path:
    """A directory with random weights of mlx_lm's module `name`; with MXFP4 experts where they are to be packed."""
    config = copy.deepcopy(config)
    for part in (config, config.get("text_config", {})):
        part |= {key: VOCABULARY for key in ("vocab_size", "vocab_size_per_layer_input") if key in part}
        part |= {"max_position_embeddings": 512} if "max_position_embeddings" in part else {}
    config |= {"eos_token_id": 256, "torch_dtype": "float32"}
    model = build(name, config)
    if packed_experts:
        nn.quantize(model, **EXPERTS, class_predicate=lambda path, layer: isinstance(layer, SwitchLinear))
        config["quantization"] = EXPERTS
    path.mkdir(parents=True)
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (path / "config.json").write_text(json.dumps(config))
    write_tokenizer(path)
    return path
