"""One adapter on disk: mlx-lm's two files, and a manifest written last.

    adapters.safetensors     lora_a, lora_b by module path; bf16, as mlx-lm names and shapes them
    adapter_config.json      what `mlx_lm.generate --adapter-path` needs, with `alpha` for tools that read only that
    manifest.json            what the adapter is: recipe, base, data by hash (never the data), metrics

A directory without a manifest of ours (trained by mlx-lm) reads too; it just can't say which base it belongs to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlx.core as mx
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from mlx_lora import __version__, paths
from mlx_lora.adapters.attach import Wrappers, adaptable, build
from mlx_lora.config import Adapter
from mlx_lora.data.read import sha256
from mlx_lora.errors import AdapterError, RecipeError

WEIGHTS, CONFIG, MANIFEST = "adapters.safetensors", "adapter_config.json", "manifest.json"
SCHEMA = 1


class Base(BaseModel):
    """The base an adapter belongs to. `source` is the fingerprint before quantizing on the way in, if that was done."""

    name: str
    fingerprint: str
    quantization: dict[str, Any] | None = None
    source: str | None = None


class Manifest(BaseModel):
    """manifest.json. `base` is None for adapters from elsewhere; `template` is how rows were encoded, chat or none."""

    model_config = ConfigDict(extra="allow")

    schema_version: int = SCHEMA
    mlx_lora: str = __version__
    created: str = ""
    method: str
    adapter: dict[str, Any]
    modules: list[str]
    scales: dict[str, float]
    base: Base | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    weights_sha256: str = ""
    template: str | None = None
    recipe: dict[str, Any] | None = None
    data: list[dict[str, Any]] = []
    metrics: dict[str, Any] = {}
    parents: list[str] = []


@dataclass
class StoredAdapter:
    """An adapter read from disk and checked on its own: its manifest and its arrays by full name."""

    path: Path
    manifest: Manifest
    arrays: dict[str, mx.array]

    @property
    def name(self) -> str:
        return self.path.name


def save(out: Path, wrappers: Wrappers, manifest: Manifest, layers: int, *, force: bool = False) -> Path:
    """Write an adapter directory whole or not at all. Factors are rounded to bf16 here, the only rounding there is.

    `layers` is the model's number of layers. Raises NameTaken when `out` exists and `force` is false.
    """
    with paths.written_whole(out, force=force) as folder:
        arrays, config = _for_mlx_lm(wrappers, manifest, layers)
        mx.save_safetensors(str(folder / WEIGHTS), arrays, metadata={"format": "mlx"})
        _write(folder / CONFIG, config)
        complete = manifest.model_copy(
            update={
                "weights_sha256": sha256(folder / WEIGHTS),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
        _write(folder / MANIFEST, complete.model_dump())
    return out


def _for_mlx_lm(wrappers: Wrappers, manifest: Manifest, layers: int) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """mlx-lm knows one rank and one scale: others are reached by zero-padding, and by folding the scale into lora_b."""
    rank = max(wrapper.rank for wrapper in wrappers.values())
    scale = next(iter(wrappers.values())).scale
    arrays = {}
    for path, wrapper in wrappers.items():
        a, b = wrapper.adapter_arrays()["lora_a"], wrapper.adapter_arrays()["lora_b"]
        expert = a.ndim == 3  # (E, r, in) and (E, out, r) instead of (in, r) and (r, out)
        a, b = _padded(a, rank, axis=1), _padded(b, rank, axis=2 if expert else 0)
        if wrapper.scale != scale:
            b = b * (wrapper.scale / scale)
        arrays[f"{path}.lora_a"], arrays[f"{path}.lora_b"] = a.astype(mx.bfloat16), b.astype(mx.bfloat16)
    config = {
        "fine_tune_type": "lora",
        "num_layers": layers,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "alpha": scale * rank,
            "dropout": manifest.adapter.get("dropout", 0.0),
            "keys": list(wrappers),
        },
        "alpha": scale * rank,
    }
    return arrays, config


def _padded(array: mx.array, rank: int, *, axis: int) -> mx.array:
    missing = rank - array.shape[axis]
    return mx.pad(array, [(0, missing if index == axis else 0) for index in range(array.ndim)]) if missing else array


def read(path: Path) -> StoredAdapter:
    """Read an adapter directory, ours or mlx-lm's. Raises AdapterError for anything missing, damaged or not finite."""
    if not path.is_dir():
        raise AdapterError(f"{path}: no such adapter")
    for name in (WEIGHTS, CONFIG):
        if not (path / name).is_file():
            raise AdapterError(f"{path}: not an adapter, {name} is missing")
    config = _read_json(path / CONFIG)
    arrays = read_arrays(path / WEIGHTS)
    manifest = _read_manifest(path, config, arrays)
    if manifest.weights_sha256 and sha256(path / WEIGHTS) != manifest.weights_sha256:
        raise AdapterError(f"{path}: {WEIGHTS} is not the file that its manifest describes", hint="train it again")
    return StoredAdapter(path, manifest, arrays)


def read_manifest(path: Path) -> Manifest:
    """The manifest alone, without loading weights."""
    return _read_manifest(path, _read_json(path / CONFIG), None)


def read_arrays(file: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file, header checked first. Raises AdapterError naming arrays with NaN or inf."""
    try:
        with safe_open(file, framework="numpy"):
            pass
        arrays = dict(mx.load(str(file)))
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise AdapterError(f"{file}: not a readable safetensors file ({error})") from None
    broken = [name for name, array in arrays.items() if not mx.all(mx.isfinite(array)).item()]
    if broken:
        raise AdapterError(f"{file}: holds NaN or infinity in {', '.join(broken[:5])}")
    return arrays


def wrappers_for(model: Any, adapter: StoredAdapter) -> Wrappers:
    """Wrappers holding an adapter's arrays, ready to `put` on `model`; its scale and rank per module are kept.

    Raises one AdapterError listing every tensor that is missing, extra, or of another shape.
    """
    base = adaptable(model)
    modules = sorted({name.rpartition(".")[0] for name in adapter.arrays})
    absent = [path for path in modules if path not in base]
    if absent:
        raise AdapterError(f"{adapter.name}: the model has no {', '.join(absent[:5])}", hint="is this the right base?")
    rank = int(adapter.manifest.adapter["rank"])
    wrappers = build(model, Adapter(rank=rank), only=modules)
    faults = []
    for path, wrapper in wrappers.items():
        wrapper.scale = adapter.manifest.scales.get(path, next(iter(adapter.manifest.scales.values())))
        for name, initial in wrapper.adapter_arrays().items():
            stored = adapter.arrays.get(f"{path}.{name}")
            if stored is None:
                faults.append(f"{path}.{name} is missing")
            elif stored.shape != initial.shape:
                faults.append(f"{path}.{name} has shape {tuple(stored.shape)}, the base needs {tuple(initial.shape)}")
            else:
                wrapper[name] = stored.astype(mx.float32)
    expected = {f"{path}.{name}" for path, wrapper in wrappers.items() for name in wrapper.adapter_params()}
    faults += [f"{name} is not part of this method" for name in adapter.arrays if name not in expected]
    faults += [f"{path} has no tensors" for path in adapter.manifest.modules if path not in wrappers]
    if faults:
        raise AdapterError(f"{adapter.name} doesn't fit the base:\n  " + "\n  ".join(faults[:12]))
    for wrapper in wrappers.values():
        wrapper.freeze()
    return wrappers


def _read_manifest(path: Path, config: dict[str, Any], arrays: dict[str, mx.array] | None) -> Manifest:
    if (path / MANIFEST).is_file():
        try:
            return Manifest.model_validate(_read_json(path / MANIFEST))
        except ValidationError as error:
            first = error.errors()[0]
            raise AdapterError(f"{path / MANIFEST}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return _manifest_of_mlx_lm(path, config, read_arrays(path / WEIGHTS) if arrays is None else arrays)


def _manifest_of_mlx_lm(path: Path, config: dict[str, Any], arrays: Mapping[str, mx.array]) -> Manifest:
    """What mlx-lm's own configuration says, as a manifest."""
    kind = config.get("fine_tune_type", "lora")
    parameters = config.get("lora_parameters")
    if kind != "lora" or not isinstance(parameters, dict):
        raise AdapterError(f"{path / CONFIG}: fine_tune_type {kind!r} is not supported, only lora")
    try:
        rank, scale = int(parameters["rank"]), float(parameters["scale"])
        adapter = Adapter(rank=rank, alpha=scale * rank, dropout=float(parameters.get("dropout", 0)))
    except (KeyError, TypeError, ValueError, RecipeError) as error:
        raise AdapterError(f"{path / CONFIG}: no usable rank and scale ({error})") from None
    modules = sorted({name.rpartition(".")[0] for name in arrays})
    return Manifest(method="lora", adapter=adapter.model_dump(), modules=modules, scales=dict.fromkeys(modules, scale))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise AdapterError(f"{file}: holds no JSON object")
    return values


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
