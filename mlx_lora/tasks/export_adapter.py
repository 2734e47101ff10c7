"""Write an adapter for PEFT or mlx-lm: the same modules, ranks and scales, or the nearest LoRA of another method."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lora import paths
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.errors import AdapterError, nearest
from mlx_lora.interop import mlx_lm
from mlx_lora.interop.card import CARD, card
from mlx_lora.interop.nearest_lora import as_lora
from mlx_lora.interop.neutral import Neutral, from_wrappers
from mlx_lora.interop.peft import write as peft
from mlx_lora.interop.peft.names import Names
from mlx_lora.methods import ADAPTER_FORMATS
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.store import registry
from mlx_lora.store.adapter import StoredAdapter, read, wrappers_for
from mlx_lora.store.base import base_for
from mlx_lora.store.manifest import CHAT_TEMPLATE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """What was written. `relative_error` is of all updates, ‖ΔW' − ΔW‖ / ‖ΔW‖; 0 unless it was approximated."""

    out: Path
    format: str
    method: str
    rank: int
    modules: int
    relative_error: float

    def as_dict(self) -> dict[str, Any]:
        """The keys of `adapters export --json`."""
        return {
            "out": str(self.out),
            "format": self.format,
            "method": self.method,
            "rank": self.rank,
            "modules": self.modules,
            "relative_error": self.relative_error,
            "bytes": paths.directory_bytes(self.out),
        }


def export_adapter(
    adapter: str,
    to: str,
    out: Path,
    *,
    model: str | None = None,
    rank: int | None = None,
    force: bool = False,
    progress: OnFile = silent,
) -> Exported:
    """Write `adapter` to the directory `out` in the format `to`, by default over its own base.

    With `rank` it is written as the nearest LoRA of that rank. Raises before the base is opened when `out` exists, and
    AdapterError for what the format can't say, before anything is written.
    """
    if to not in ADAPTER_FORMATS:
        raise AdapterError(f"{to!r} is no format of adapters{nearest(to, ADAPTER_FORMATS)}")
    paths.check_target(out, force=force)
    stored = read(registry.find(adapter))
    opened = base_for(model, [stored])
    paths.check_apart(out, model=opened.path, adapter=stored.path)
    loaded = registry.open_stored(opened, [stored], lazily=True)
    wrappers = wrappers_for(loaded.model, stored)
    neutral, error = _neutral(wrappers, rank, progress)
    if to == "peft" and (packed := loaded.config.get("quantization")):
        said = "%s was trained over packed weights (%s bits); over the original ones it answers a little differently"
        log.info(said, stored.name, packed.get("bits"))
    if to == "peft":
        base = stored.manifest.base.name if stored.manifest.base else registry.base_name(loaded.path)
        names = Names(loaded.model, loaded.config)
        texts = {CARD: _card(stored, loaded.path, rank, error)}
        if stored.chat_template is not None:
            texts[CHAT_TEMPLATE] = stored.chat_template
        peft.write(neutral, out, names, base=base, texts=texts, force=force)
    else:
        mlx_lm.write(neutral, out, loaded.model, len(layers_of(loaded.model)), force=force)
    largest = max(module.rank for module in neutral.modules.values())
    return Exported(out, to, neutral.method, largest, len(neutral.modules), error)


def _neutral(wrappers: Any, rank: int | None, progress: OnFile) -> tuple[Neutral, float]:
    if rank is None:
        return from_wrappers(wrappers), 0.0
    return as_lora(wrappers, rank, on_module=progress("finding the nearest LoRA", len(wrappers)))


def _card(stored: StoredAdapter, base: Path, rank: int | None, error: float) -> str:
    """README.md beside a PEFT adapter; `rank` where it is the nearest LoRA of that rank."""
    near = [f"the nearest LoRA of rank {rank}: its updates are {error:.2g} (relative) from the trained ones"]
    use = ["`PeftModel.from_pretrained(model, DIRECTORY)`, with the base that transformers loaded as `model`"]
    checked = near if rank is not None else ["not run by PEFT; ranks, scales and factors are the trained ones"]
    return card(stored.manifest, name=stored.name, form="PEFT adapter", base=base, checked=checked, use=use)
