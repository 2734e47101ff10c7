"""Bring an adapter of PEFT, mlx-lm or llama.cpp into the home, checked against its base."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lora import files, paths
from mlx_lora.adapters.placement import serving
from mlx_lora.adapters.targets import bare_modules
from mlx_lora.errors import AdapterError, NameTaken
from mlx_lora.interop import mlx_lm
from mlx_lora.interop.gguf.adapter import read_adapter
from mlx_lora.interop.neutral import Neutral, settings_of, shapes_of, to_store, usable
from mlx_lora.interop.peft import read as peft
from mlx_lora.interop.peft.config import CONFIG, WEIGHTS
from mlx_lora.models.load import LoadedModel
from mlx_lora.models.open import Model, OpenModel, open_model
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.store import fingerprint, registry
from mlx_lora.store.fitting import listed
from mlx_lora.store.lock import locked
from mlx_lora.store.manifest import CHAT_TEMPLATE, MANIFEST, Manifest


@dataclass(frozen=True)
class Imported:
    """What was stored: `format` is where it came from, `rank` the largest, 0 for a method without ranks."""

    path: Path
    format: str
    method: str
    rank: int
    modules: int
    base: str

    def as_dict(self) -> dict[str, Any]:
        """The keys of `adapters import --json`."""
        return {
            "adapter": str(self.path),
            "name": self.path.name,
            "format": self.format,
            "method": self.method,
            "rank": self.rank,
            "modules": self.modules,
            "base": self.base,
            "bytes": paths.directory_bytes(self.path),
        }


def import_adapter(source: Path, name: str, model: Model, *, force: bool = False) -> Imported:
    """Store the adapter at `source`, a directory or a GGUF file, as `name`, for the base that `model` names.

    Raises before anything is read where the name is taken, and AdapterError for all that isn't understood or doesn't
    fit, before anything is written.
    """
    target, run = paths.room("adapters", name), paths.room("runs", name)
    if (target.exists() or run.exists()) and not force:
        what = f"an adapter {name!r}" if target.exists() else f"a run {name!r}"
        raise NameTaken(f"{what} exists", hint="choose another --name, or --force to replace it")
    paths.check_target(target, force=force)
    kind = format_of(source)
    opened = open_model(model)
    loaded = registry.open_stored(opened, lazily=True)
    neutral = usable(_read(source, kind, opened, loaded))
    check_served(neutral, loaded)
    base = registry.describe_base(loaded)
    known = Manifest(
        method=neutral.method,
        adapter={},
        modules=[],
        scales={},
        base=base,
        tokenizer=fingerprint.of_tokenizer(loaded.path),
        metrics={"import": {"format": kind, "name": source.resolve().name}},
    )
    shapes = shapes_of(bare_modules(loaded.model))
    with locked(name):
        to_store(
            neutral, target, known, len(layers_of(loaded.model)), shapes=shapes, chat_template=_template(source),
            force=force,
        )  # fmt: skip
        if run.is_dir():  # of the adapter that was replaced
            shutil.rmtree(run)
    rank = max(module.rank for module in neutral.modules.values())
    return Imported(target, kind, neutral.method, rank, len(neutral.modules), base.name)


def format_of(source: Path) -> str:
    """`peft`, `mlx-lm` or `gguf`, by what is there. Raises AdapterError for anything else."""
    if source.is_file() and source.suffix == ".gguf":
        return "gguf"
    if not source.is_dir():
        what = "is a file; an adapter is the directory around it" if source.is_file() else "doesn't exist"
        raise AdapterError(f"{source} {what}, or a .gguf file")
    if (source / MANIFEST).is_file():
        raise AdapterError(
            f"{source} is an adapter of mlx-lora already",
            hint=f"use it where it is, --adapter {source}, or copy it to {paths.home() / 'adapters'}",
        )
    if not (source / CONFIG).is_file():
        inside = sorted(folder.parent.name for folder in source.glob(f"*/{CONFIG}"))
        hint = f"it is in one of: {', '.join(inside[:8])}" if inside else "an adapter of PEFT or mlx-lm has one"
        raise AdapterError(f"{source}: no {CONFIG}", hint=hint)
    config = files.read_json(source / CONFIG, AdapterError, finite=True)
    if isinstance(config, dict) and "peft_type" in config:
        return "peft"
    if isinstance(config, dict) and {"fine_tune_type", "lora_parameters"} & config.keys():
        return "mlx-lm"
    looks = "PEFT's" if (source / WEIGHTS).is_file() else "an adapter's"
    raise AdapterError(f"{source / CONFIG}: has no peft_type and no lora_parameters, so it isn't {looks} configuration")


def _read(source: Path, kind: str, opened: OpenModel, loaded: LoadedModel) -> Neutral:
    if kind == "peft":
        return peft.read(source, loaded.model, loaded.config)
    return mlx_lm.read(source, loaded.model) if kind == "mlx-lm" else read_adapter(source, opened)


def _template(source: Path) -> str | None:
    """The chat template that lies beside an adapter in a directory."""
    file = source / CHAT_TEMPLATE
    return files.read_text(file, AdapterError) if file.is_file() else None


def check_served(neutral: Neutral, loaded: LoadedModel) -> None:
    """Raise AdapterError naming the modules that our own method can't wrap in this model."""
    found = list(neutral.modules)
    served = serving(loaded.model, settings_of(neutral), found)
    if refused := [f"{path}: {neutral.method} can't be on this layer here" for path in found if path not in served]:
        raise AdapterError("the adapter can't be used with this base:\n  " + listed(refused))
