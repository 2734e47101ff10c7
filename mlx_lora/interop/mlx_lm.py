"""Adapters of mlx-lm, both ways: one rank and one scale for all modules, LoRA and DoRA.

Our own directories have mlx-lm's two files already, beside a manifest. What is written here has those two alone, in the
form of any `Neutral`: smaller ranks are padded with zeros, and other scales are folded into lora_b.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_lora import paths
from mlx_lora.adapters.targets import bare_modules
from mlx_lora.errors import AdapterError
from mlx_lora.interop.neutral import Neutral, arrays_of, from_wrappers
from mlx_lora.store import adapter as store
from mlx_lora.store.fitting import listed, wrappers_for
from mlx_lora.store.manifest import MLX_LM


def read(folder: Path, model: nn.Module) -> Neutral:
    """An adapter that mlx-lm trained, of old or new configuration. Raises AdapterError where it doesn't fit `model`."""
    return from_wrappers(wrappers_for(model, store.read(folder)))


def write(neutral: Neutral, out: Path, model: nn.Module, layers: int, *, force: bool = False) -> Path:
    """Write the directory `out` whole or not at all, for `mlx_lm.generate --adapter-path`.

    `layers` is the model's number of layers. Arrays are float32, as mlx-lm writes them: it multiplies an embedding's
    factors, and those of DoRA, in the dtype of the file. Raises one AdapterError for what mlx-lm can't load, before
    anything is written.
    """
    _check(neutral, model)
    stored = {path: arrays_of(module, neutral.method) for path, module in neutral.modules.items()}
    arrays, scale = store.padded_alike(stored, {path: module.scale for path, module in neutral.modules.items()})
    rank = max(module.rank for module in neutral.modules.values())
    config = store.mlx_lm_config(neutral.method, list(neutral.modules), layers, rank=rank, scale=scale)
    with paths.written_whole(out, force=force) as folder:
        with paths.created(folder / store.WEIGHTS) as stream:
            mx.save_safetensors(stream, arrays, {"format": "mlx"})
        with paths.created(folder / store.CONFIG) as stream:
            stream.write((json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    return out


def _check(neutral: Neutral, model: nn.Module) -> None:
    if neutral.method not in MLX_LM:
        raise AdapterError(
            f"mlx-lm has no {neutral.method}, only {' and '.join(MLX_LM)}",
            hint="--as-lora RANK writes the nearest LoRA, and says how near",
        )
    if neutral.method == "lora":
        return
    modules = bare_modules(model)
    faults = [
        f"{path}: mlx-lm has no DoRA on experts" for path, module in neutral.modules.items() if module.kind == "experts"
    ]
    faults += [
        f"{path}: mlx-lm's DoRA can't be on a layer of {modules[path].bits} bits"
        for path in neutral.modules
        if 32 % getattr(modules[path], "bits", 32)
    ]
    if faults:
        raise AdapterError(listed(faults), hint="--as-lora RANK writes the nearest LoRA, and says how near")
