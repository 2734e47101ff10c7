"""The most memory that `quantize` and `fuse` take on a directory of LLaMA-7B's shape: random weights in float16.

Each function is a process of its own. The directory is written a layer at a time, like everything else here.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

VOCABULARY = 32000


def write(folder: str, *, layers: int, hidden: int = 4096, intermediate: int = 11008) -> dict[str, Any]:
    """The float16 directory, a shard for the embedding and the head, and one for every layer."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs, TransformerBlock

    from mlx_lora.paths import bundled

    path = Path(folder)
    path.mkdir(parents=True)
    config = {
        "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": intermediate,
        "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "vocab_size": VOCABULARY,
        "tie_word_embeddings": False, "max_position_embeddings": 2048, "torch_dtype": "float16",
    }  # fmt: skip
    mx.random.seed(0)
    args = ModelArgs.from_dict(config)
    ends = Model(ModelArgs.from_dict(config | {"num_hidden_layers": 1}))
    outside = {name: array for name, array in tree_flatten(ends.parameters()) if ".layers." not in name}
    _save(path / "model-ends.safetensors", outside)
    del ends
    for index in range(layers):
        layer = tree_flatten(TransformerBlock(args).parameters())
        _save(path / f"model-{index:02d}.safetensors", {f"model.layers.{index}.{name}": a for name, a in layer})
        del layer
    (path / "config.json").write_text(json.dumps(config))
    for file in bundled("data", "base").iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copyfile(file, path / file.name)
    return {"bytes": sum(file.stat().st_size for file in path.iterdir())}


def _save(file: Path, arrays: dict[str, Any]) -> None:
    import mlx.core as mx

    halves = {name: array.astype(mx.float16) for name, array in arrays.items()}
    for name in halves:
        arrays[name] = None
        mx.eval(halves[name])
    mx.save_safetensors(str(file), halves, {"format": "mlx"})


def quantize(model: str, out: str, verify: str | None = None) -> dict[str, Any]:
    """`quantize --bits 4` with its measurement, on our text by default."""
    from mlx_lora.config import Quantize
    from mlx_lora.tasks.quantize import quantize_model

    began = time.perf_counter()
    report = quantize_model(model, Path(out), Quantize(bits=4, group_size=64), verify=verify)
    kept = {key: report[key] for key in ("bits_per_weight", "relative_error", "kl", "top1_agreement")}
    return {"seconds": [time.perf_counter() - began], "result_bytes": _weights(Path(out)), **kept}


def adapter(model: str, folder: str) -> dict[str, Any]:
    """A rank 8 adapter with random factors on the attention of every layer."""
    import mlx.core as mx

    from mlx_lora.adapters.attach import build
    from mlx_lora.config import Adapter
    from mlx_lora.models.load import load_stored
    from mlx_lora.store import adapter as store
    from mlx_lora.store.adapter import Manifest

    settings = Adapter(rank=8, alpha=8, targets="attention")
    wrappers = build(load_stored(model).model, settings, seed=1)
    for index, wrapper in enumerate(wrappers.values()):
        wrapper.lora_b = 0.01 * mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(index))
    manifest = Manifest(
        method="lora", adapter=settings.model_dump(), modules=list(wrappers), scales=dict.fromkeys(wrappers, 1.0)
    )
    store.save(Path(folder), wrappers, manifest, -1)
    return {"modules": len(wrappers)}


def fuse(model: str, adapter: str, out: str, data: str | None = None) -> dict[str, Any]:
    """`fuse --bits mixed` with its comparison, on generated text by default."""
    from mlx_lora.tasks.fuse import fuse_adapter

    began = time.perf_counter()
    report = fuse_adapter(model, adapter, Path(out), bits="mixed", data=data).as_dict()
    kept = {key: report[key] for key in ("delta_survival", "kl", "top1_agreement")}
    return {"seconds": [time.perf_counter() - began], "result_bytes": _weights(Path(out)), **kept}


def nothing(model: str) -> dict[str, Any]:
    """What the process takes before it has read any weight: the interpreter, MLX, mlx_lm and a tokenizer."""
    from mlx_lora.models.load import load_stored
    from mlx_lora.tasks import fuse, quantize  # noqa: F401

    load_stored(model)
    return {"seconds": [0.0]}


def _weights(folder: Path) -> int:
    return sum(os.path.getsize(file) for file in folder.glob("*.safetensors"))
