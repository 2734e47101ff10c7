"""One adapter on disk: mlx-lm's two files, and a manifest written last.

    adapters.safetensors     arrays by module path; LoRA's and DoRA's as mlx-lm names and shapes them
    adapter_config.json      what `mlx_lm.generate --adapter-path` needs, with `alpha` for tools that read only that
    manifest.json            what the adapter is: recipe, base, data by hash (never the data), metrics
    chat_template.jinja      the template it was trained with, if it isn't the model's own

Arrays are rounded to bf16, but for those that multiply, which stay float32. mlx-lm knows LoRA, DoRA and full weights;
what it doesn't know has a configuration that it refuses. A directory without a manifest of ours (trained by mlx-lm)
reads too; it just can't say which base it belongs to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_lora import files, paths
from mlx_lora.adapters.attach import Wrappers
from mlx_lora.config import Adapter
from mlx_lora.data.read import sha256
from mlx_lora.errors import AdapterError
from mlx_lora.store.fitting import listed, rank_axis, wrappers_for
from mlx_lora.store.manifest import (
    CHAT_TEMPLATE,
    CONFIG,
    MANIFEST,
    MLX_LM,
    WEIGHTS,
    Base,
    Manifest,
    rank_and_scale,
    read_config,
    read_manifest,
)

__all__ = [
    "CONFIG", "MANIFEST", "MLX_LM", "WEIGHTS", "Base", "Manifest", "StoredAdapter", "read", "read_arrays",
    "read_manifest", "save", "wrappers_for", "write",
]  # fmt: skip


@dataclass
class StoredAdapter:
    """An adapter read from disk and checked on its own: its manifest and its arrays by full name.

    `rank` and `scale` are those of the arrays where mlx-lm knows the method: modules with others are zero-padded, and
    scaled in lora_b. Left out, they are the manifest's. For other methods every module has its own.
    """

    path: Path
    manifest: Manifest
    arrays: dict[str, mx.array]
    rank: int = 0
    scale: float = 0.0

    def __post_init__(self) -> None:
        self.rank = self.rank or int(self.manifest.adapter["rank"])
        self.scale = self.scale or next(iter(self.manifest.scales.values()), 0.0)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def chat_template(self) -> str | None:
        """The template it was trained with, where that isn't the model's own."""
        return files.read_text(file, AdapterError) if (file := self.path / CHAT_TEMPLATE).exists() else None


def save(
    out: Path,
    wrappers: Wrappers,
    manifest: Manifest,
    layers: int,
    *,
    chat_template: str | None = None,
    force: bool = False,
) -> Path:
    """Write an adapter directory whole or not at all. Arrays are rounded here, the only rounding there is.

    `layers` is the model's number of layers. Raises NameTaken when `out` exists and `force` is false.
    """
    stored = {path: wrapper.stored_arrays() for path, wrapper in wrappers.items()}
    scales = {path: wrapper.scale for path, wrapper in wrappers.items()}
    precise = {f"{path}.{name}" for path, wrapper in wrappers.items() for name in wrapper.PRECISE}
    return write(out, stored, scales, manifest, layers, precise=precise, chat_template=chat_template, force=force)


def write(
    out: Path,
    stored: dict[str, dict[str, mx.array]],
    scales: dict[str, float],
    manifest: Manifest,
    layers: int,
    *,
    precise: Collection[str] = (),
    shared: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    force: bool = False,
) -> Path:
    """`save` for arrays by module path and name, of which `precise` names those to keep in float32.

    `shared` are arrays of the whole adapter by name, kept in float32: VeRA's pair `vera_A` (r, largest in) and `vera_B`
    (largest out, r) where the seed in the manifest doesn't draw it.
    """
    manifest = _as_stored(manifest, stored)
    if manifest.method in MLX_LM:
        arrays, scale = padded_alike(stored, scales)
        config = _config_of(manifest, layers, scale)
    else:
        arrays = {f"{path}.{name}": array for path, named in stored.items() for name, array in named.items()}
        config = {"fine_tune_type": manifest.method, "num_layers": layers}
    rounded = {name: array.astype(mx.float32 if name in precise else mx.bfloat16) for name, array in arrays.items()}
    rounded |= {name: mx.array(array, mx.float32) for name, array in (shared or {}).items()}
    with paths.written_whole(out, force=force) as folder:
        with paths.created(folder / WEIGHTS) as stream:
            mx.save_safetensors(stream, rounded, metadata={"format": "mlx"})
        _write(folder / CONFIG, config)
        if chat_template is not None:
            with paths.created(folder / CHAT_TEMPLATE) as stream:
                stream.write(chat_template.encode())
        _write(folder / MANIFEST, _completed(manifest, folder).model_dump())
    return out


def _completed(manifest: Manifest, folder: Path) -> Manifest:
    """The manifest of the weights in `folder`, which is written last."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return manifest.model_copy(update={"weights_sha256": sha256(folder / WEIGHTS), "created": created})


def _as_stored(manifest: Manifest, stored: dict[str, dict[str, mx.array]]) -> Manifest:
    """A manifest that says what the arrays are: some are wider than what was trained (PiSSA's first factors)."""
    settings = Adapter.model_validate(manifest.adapter)
    ranks = {path: _rank(named) for path, named in stored.items() if "lora_a" in named}
    changed: dict[str, Any] = {"init": "default"}
    if any(settings.rank_of(path) != rank for path, rank in ranks.items()):
        usual = max(set(ranks.values()), key=list(ranks.values()).count)
        others = {re.escape(path): rank for path, rank in ranks.items() if rank != usual}
        changed |= {"rank": usual, "rank_pattern": others}
    return manifest.model_copy(update={"adapter": settings.model_dump() | changed})


def padded_alike(stored: dict[str, dict[str, mx.array]], scales: dict[str, float]) -> tuple[dict[str, mx.array], float]:
    """mlx-lm knows one rank and one scale: others are reached by zero-padding, and by folding the scale into lora_b."""
    rank, scale = max(_rank(named) for named in stored.values()), next(iter(scales.values()))
    arrays = {}
    for path, named in stored.items():
        for name, array in named.items():
            if name == "lora_b" and scales[path] != scale:
                array = array * (scales[path] / scale)
            axis = rank_axis(name, array.ndim)
            arrays[f"{path}.{name}"] = array if axis is None else _padded(array, rank, axis=axis)
    return arrays, scale


def _config_of(manifest: Manifest, layers: int, scale: float) -> dict[str, Any]:
    settings = Adapter.model_validate(manifest.adapter)
    rank = max(map(settings.rank_of, manifest.modules))
    return mlx_lm_config(manifest.method, manifest.modules, layers, rank=rank, scale=scale, dropout=settings.dropout)


def mlx_lm_config(
    method: str, modules: list[str], layers: int, *, rank: int, scale: float, dropout: float = 0.0
) -> dict[str, Any]:
    """adapter_config.json for mlx-lm, with `alpha` for tools that read only that."""
    alpha = scale * rank
    parameters = {"rank": rank, "scale": scale, "alpha": alpha, "dropout": dropout, "keys": modules}
    return {"fine_tune_type": method, "num_layers": layers, "lora_parameters": parameters, "alpha": alpha}


def _rank(named: dict[str, mx.array]) -> int:
    array = named["lora_a"]
    return int(array.shape[rank_axis("lora_a", array.ndim)])  # type: ignore[index]


def _padded(array: mx.array, rank: int, *, axis: int) -> mx.array:
    missing = rank - array.shape[axis]
    return mx.pad(array, [(0, missing if index == axis else 0) for index in range(array.ndim)]) if missing else array


def read(path: Path, *, weights_sha256: str | None = None) -> StoredAdapter:
    """Read an adapter directory, ours or mlx-lm's. Raises AdapterError for anything missing, damaged or not finite.

    `weights_sha256` is that of the weights' file where it is known already.
    """
    if not path.is_dir():
        raise AdapterError(f"{path}: no such adapter")
    if missing := [name for name in (WEIGHTS, CONFIG) if not (path / name).is_file()]:
        raise AdapterError(f"{path}: not an adapter, {' and '.join(missing)} missing")
    config = read_config(path)
    arrays = read_arrays(path / WEIGHTS)
    manifest = read_manifest(path)
    rank, scale = rank_and_scale(path / CONFIG, config) if manifest.method in MLX_LM else (0, 0.0)
    faults = []
    if manifest.weights_sha256 and (weights_sha256 or sha256(path / WEIGHTS)) != manifest.weights_sha256:
        faults.append(f"{WEIGHTS} is not the file that the manifest describes")
    if manifest.weights_sha256 and manifest.method in MLX_LM and [rank, scale] != _implied(manifest):
        faults.append(f"{CONFIG} says rank {rank} and scale {scale:g}, which is not what the manifest describes")
    if not arrays:
        faults.append(f"{WEIGHTS} holds no tensors")
    finite = {name: mx.isfinite(array).all() for name, array in arrays.items()}
    mx.eval(finite)
    faults += [f"{name} holds NaN or infinity" for name, holds in finite.items() if not holds.item()]
    if faults:
        raise AdapterError(f"{path}: " + listed(faults), hint="train it again, or restore it from a copy")
    return StoredAdapter(path, manifest, arrays, rank, scale)


def _implied(manifest: Manifest) -> list[float]:
    """The one rank and scale that the file of a manifest's modules has, as `save` wrote them."""
    settings = Adapter.model_validate(manifest.adapter)
    return [max(map(settings.rank_of, manifest.modules)), manifest.scales[manifest.modules[0]]]


def read_arrays(file: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file, header checked first. Raises AdapterError for any other file."""
    if found := files.safetensors_fault(file):
        raise AdapterError(f"{file}: {found}")
    with files.refusing(AdapterError, f"{file}: not a readable safetensors file"):
        arrays: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
    return arrays


def _write(file: Path, values: dict[str, Any]) -> None:
    with paths.created(file) as stream:
        stream.write((json.dumps(values, indent=2, sort_keys=True) + "\n").encode())
