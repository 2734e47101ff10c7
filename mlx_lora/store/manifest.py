"""What an adapter is, as its directory says: manifest.json, or mlx-lm's configuration where there is none.

Reads no weights and imports no MLX, so a list of adapters is quick; `store.adapter` reads and writes the rest.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mlx_lora import __version__, files
from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError

WEIGHTS, CONFIG, MANIFEST = "adapters.safetensors", "adapter_config.json", "manifest.json"
CHAT_TEMPLATE = "chat_template.jinja"
SCHEMA = 1
# Methods whose files mlx-lm reads as they are, with one rank and one scale for all modules.
MLX_LM = ("lora", "dora")


class Base(BaseModel):
    """The base an adapter belongs to. `source` is the fingerprint before quantizing on the way in, if that was done."""

    name: str
    fingerprint: str
    quantization: dict[str, Any] | None = None
    source: str | None = None


class Manifest(BaseModel):
    """manifest.json. `base` is None for adapters from elsewhere; `template` is how rows were encoded, chat or none.

    `thinking` is how the adapter is asked, on, off or (None) as the model has it. `answer_end` is the token that ends
    its answers where its chat template isn't the model's own: that one lies beside the manifest.
    `scales` are the modules' scales as trained. The file has one scale and one rank for all, in adapter_config.json.
    """

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
    thinking: bool | None = None
    answer_end: str | None = None
    recipe: dict[str, Any] | None = None
    data: list[dict[str, Any]] = []
    metrics: dict[str, Any] = {}
    parents: list[str] = []


def read_manifest(path: Path) -> Manifest:
    """The manifest of an adapter directory; for an adapter of mlx-lm, which has none, made of what its files say.

    Raises AdapterError for one that is missing, damaged, or newer than this program.
    """
    file, config = path / MANIFEST, read_config(path)
    if not os.path.lexists(file):
        with files.refusing(AdapterError, f"{path / CONFIG}: no usable rank and scale"):
            return _manifest_of_mlx_lm(path, config)
    values = _read_json(file)
    if isinstance(version := values.get("schema_version"), int) and version > SCHEMA:
        raise AdapterError(f"{file}: schema version {version} is newer than this mlx-lora", hint="upgrade mlx-lora")
    try:
        manifest = _complete(Manifest.model_validate(values))
        settings = Adapter.model_validate(manifest.adapter)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise AdapterError(f"{file}: {where}: {first['msg'].removeprefix('Value error, ')}") from None
    if not manifest.modules or not manifest.scales.keys() >= set(manifest.modules):
        raise AdapterError(f"{file}: modules: not one or more modules, each with its scale")
    return manifest.model_copy(update={"adapter": settings.model_dump()})


def _complete(manifest: Manifest) -> Manifest:
    """With what older versions didn't write: they had nothing but zero-points in float32."""
    if "qalora" not in manifest.method:
        return manifest
    return manifest.model_copy(update={"adapter": {"zero_points": "float32"} | manifest.adapter})


def _manifest_of_mlx_lm(path: Path, config: dict[str, Any]) -> Manifest:
    """What mlx-lm's own configuration and the names of its arrays say, as a manifest."""
    rank, scale = rank_and_scale(path / CONFIG, config)
    if found := files.safetensors_fault(path / WEIGHTS):
        raise AdapterError(f"{path / WEIGHTS}: {found}")
    modules = sorted({tensor.name.rpartition(".")[0] for tensor in files.tensors(path / WEIGHTS, AdapterError)})
    try:
        dropout = config["lora_parameters"].get("dropout", 0.0)
        settings = Adapter(method=method_of(config), rank=rank, alpha=scale * rank, dropout=dropout)
    except ValidationError as error:
        raise AdapterError(f"{path / CONFIG}: {error.errors()[0]['msg']}") from None
    scales = dict.fromkeys(modules, scale)
    return Manifest(method=settings.method, adapter=settings.model_dump(), modules=modules, scales=scales)


def rank_and_scale(file: Path, config: dict[str, Any]) -> tuple[int, float]:
    """The one rank and the one scale of the arrays, from mlx-lm's configuration.

    mlx-lm of 2024 had an `alpha` beside `scale`, and multiplied by scale · alpha / rank. Later versions ignore it; they
    write `optimizer`, which those didn't. Our own configurations have `alpha` at the top too, where it is scale · rank.
    """
    method, parameters = method_of(config), config.get("lora_parameters")
    if method not in MLX_LM or not isinstance(parameters, dict):
        raise AdapterError(f"{file}: fine_tune_type {method!r} is not supported, only {' and '.join(MLX_LM)}")
    try:
        rank, scale = int(parameters["rank"]), float(parameters["scale"])
        if parameters.get("alpha") is not None and not {"alpha", "optimizer"} & config.keys():
            scale *= float(parameters["alpha"]) / rank
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise AdapterError(f"{file}: no usable rank and scale ({error})") from None
    return rank, scale


def method_of(config: dict[str, Any]) -> Any:
    """`fine_tune_type`, which mlx-lm's first configurations didn't have: they said `use_dora`."""
    return config.get("fine_tune_type", "dora" if config.get("use_dora") is True else "lora")


def read_config(path: Path) -> dict[str, Any]:
    """The content of an adapter's adapter_config.json. Raises AdapterError where it isn't one."""
    return _read_json(path / CONFIG)


def _read_json(file: Path) -> dict[str, Any]:
    values = files.read_json(file, AdapterError, finite=True)
    if not isinstance(values, dict):
        raise AdapterError(f"{file}: holds no JSON object")
    return values
