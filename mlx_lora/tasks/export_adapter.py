"""Write an adapter for PEFT or mlx-lm: the same modules, ranks and scales, or the nearest LoRA of another method."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_lora import paths
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.errors import AdapterError, nearest
from mlx_lora.interop import gate, hf, mlx_lm
from mlx_lora.interop.card import CARD, card, said_of
from mlx_lora.interop.nearest_lora import as_lora
from mlx_lora.interop.neutral import Neutral, from_wrappers
from mlx_lora.interop.peft import write as peft
from mlx_lora.interop.peft.names import Names
from mlx_lora.machine import limits
from mlx_lora.methods import ADAPTER_FORMATS
from mlx_lora.models.load import LoadedModel
from mlx_lora.models.open import OpenModel, weight_files
from mlx_lora.models.peer import put_adapter
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.places.listing import REPO
from mlx_lora.store import registry
from mlx_lora.store.adapter import StoredAdapter, wrappers_for
from mlx_lora.store.manifest import CHAT_TEMPLATE
from mlx_lora.tasks.export_check import RECORD, Reference, record, reference, sources

# In place of rows to check on: don't.
NO_ROWS = "none"

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
    check: dict[str, Any] | None
    unchecked: str | None

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
            "check": self.check,
            "unchecked": self.unchecked,
        }


def export_adapter(
    adapter: str,
    to: str,
    out: Path,
    *,
    model: str | None = None,
    rank: int | None = None,
    checked_on: str | None = NO_ROWS,
    force: bool = False,
    progress: OnFile = silent,
) -> Exported:
    """Write `adapter` to the directory `out` in the format `to`, by default over its own base.

    With `rank` it is written as the nearest LoRA of that rank. PEFT or mlx_lm then runs it on the rows of `checked_on`,
    or on text that base and adapter write where that is None; NO_ROWS leaves this out. Raises before the base is opened
    when `out` exists, AdapterError for what the format can't say, before anything is written, and CannotFuse, leaving
    nothing, where the adapter isn't in what was written.
    """
    if to not in ADAPTER_FORMATS:
        raise AdapterError(f"{to!r} is no format of adapters{nearest(to, ADAPTER_FORMATS)}")
    opened, stored = sources(model, adapter, out, force)
    loaded = registry.open_stored(opened, [stored], lazily=True)
    neutral, error = _neutral(wrappers_for(loaded.model, stored), rank, progress)
    unchecked = _not_checked(to, loaded) if checked_on != NO_ROWS else "not asked for"
    before = None if unchecked else reference(opened, stored, checked_on, progress=progress)
    with paths.written_whole(out, force=force) as folder:
        _write(to, neutral, loaded, stored, folder / "adapter")
        for file in (folder / "adapter").iterdir():
            file.rename(folder / file.name)
        (folder / "adapter").rmdir()
        found = None
        if before is not None:
            found = _check(to, folder, opened, stored, before, progress)
            gate.refuse_lost(found, force=force)
        report = record(folder / RECORD, to, opened, stored, found, unchecked=unchecked, relative_error=error)
        with paths.created(folder / CARD) as stream:
            stream.write(_card(to, stored, loaded.path, rank, report).encode())
    largest = max(module.rank for module in neutral.modules.values())
    return Exported(out, to, neutral.method, largest, len(neutral.modules), error, report["check"], unchecked)


def _write(to: str, neutral: Neutral, loaded: LoadedModel, stored: StoredAdapter, out: Path) -> None:
    if to == "mlx-lm":
        mlx_lm.write(neutral, out, loaded.model, len(layers_of(loaded.model)))
        return
    if packed := loaded.config.get("quantization"):
        said = "%s was trained over packed weights (%s bits); over the original ones it answers a little differently"
        log.info(said, stored.name, packed.get("bits"))
    base = stored.manifest.base.name if stored.manifest.base else registry.base_name(loaded.path)
    repo = base if REPO.fullmatch(base) else None  # PEFT would ask the hub for any other name
    texts = {} if stored.chat_template is None else {CHAT_TEMPLATE: stored.chat_template}
    peft.write(neutral, out, Names(loaded.model, loaded.config), base=repo, texts=texts)


def _not_checked(to: str, loaded: LoadedModel) -> str | None:
    """Why the other tool can't run the adapter here, or None."""
    if to == "mlx-lm":
        return None
    if loaded.config.get("quantization"):
        return "its base is packed, which transformers doesn't load"
    if not (hf.transformers_here() and find_spec("peft")):
        return "PEFT isn't there to run it: pip install peft torch"
    return limits.too_large(sum(file.stat().st_size for file in weight_files(loaded.path)))


def _check(
    to: str, folder: Path, opened: OpenModel, stored: StoredAdapter, before: Reference, progress: OnFile
) -> gate.Checked:
    """What PEFT or mlx_lm says with the adapter that was written."""
    progress("running what was written", None)
    if to == "peft":
        found = hf.top_tokens(opened.path, before.prompts, count=gate.COUNT * 10, adapter=folder)
        program = "PEFT"
    else:
        loaded = registry.open_base(opened, [stored])
        put_adapter(loaded.model, folder)
        found, program = gate.top_tokens(loaded.model, before.asked, count=gate.COUNT * 10), "mlx_lm"
    return gate.check(program, before.live, before.base, found)


def _neutral(wrappers: Any, rank: int | None, progress: OnFile) -> tuple[Neutral, float]:
    if rank is None:
        return from_wrappers(wrappers), 0.0
    return as_lora(wrappers, rank, on_module=progress("finding the nearest LoRA", len(wrappers)))


def _card(to: str, stored: StoredAdapter, base: Path, rank: int | None, report: dict[str, Any]) -> str:
    """README.md beside the adapter; `rank` where it is the nearest LoRA of that rank."""
    error = report["relative_error"]
    near = [f"the nearest LoRA of rank {rank}: its updates are {error:.2g} (relative) from the trained ones"]
    form, use = {
        "peft": (
            "PEFT adapter",
            "`PeftModel.from_pretrained(model, DIRECTORY)`, over the base of transformers",
        ),
        "mlx-lm": ("mlx-lm adapter", "`mlx_lm.generate --model BASE --adapter-path DIRECTORY`"),
    }[to]
    checked = [*(near if rank is not None else []), *said_of(report)]
    return card(stored.manifest, name=stored.name, form=form, base=base, checked=checked, use=[use])
