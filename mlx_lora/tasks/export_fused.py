"""Export base and adapter, fused, as a directory: for transformers, or for LM Studio.

The files are written into a directory beside the target, run there by the program that they are for, and get their
name only afterwards: whatever happens on the way leaves nothing, or what was there before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora import paths
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.interop import gate, hf, lmstudio
from mlx_lora.interop.card import CARD, card, said_of
from mlx_lora.interop.fuse import Fused, fuse
from mlx_lora.machine import limits
from mlx_lora.models import chat_templates
from mlx_lora.models.load import LoadedModel, load
from mlx_lora.models.open import OpenModel
from mlx_lora.models.shards import Named
from mlx_lora.serve.conversation import trained
from mlx_lora.store import registry
from mlx_lora.store.adapter import StoredAdapter
from mlx_lora.tasks.export_check import RECORD, Reference, record, reference, sources

Check = Callable[[Path, Reference], gate.Checked]


@dataclass(frozen=True)
class Form:
    """What is written: `bits` as `fuse` takes them, the names of tensors, who runs it, and what the card says."""

    format: str
    title: str
    bits: str | None
    renamed: Callable[[nn.Module, Named], Named]
    check: Check
    use: Sequence[str] = ()


def export_hf(
    model: str | None,
    adapter: str,
    out: Path,
    *,
    data: str | None = None,
    force: bool = False,
    progress: OnFile = silent,
) -> dict[str, Any]:
    """Merge `adapter` into `model` (by default its own base), in half precision and as transformers names it, as `out`.

    Returns what is kept in export.json. Raises before anything is written when `out` exists or transformers' names of
    the architecture aren't known, and CannotFuse, leaving nothing, where the adapter isn't in what was written.
    """
    opened, stored = sources(model, adapter, out, force)
    hf.check(registry.open_stored(opened, [stored], lazily=True).model)
    form = Form("hf", "Half-precision model for transformers, fused", "16", hf.renamed, check_in_transformers)
    return _export(opened, stored, out, form, data, force, progress)


def export_lmstudio(
    model: str | None,
    adapter: str,
    out: Path | None = None,
    *,
    bits: str | None = None,
    data: str | None = None,
    force: bool = False,
    progress: OnFile = silent,
) -> dict[str, Any]:
    """The same as an MLX model of `bits` as `fuse` takes them, by default in LM Studio's own folder.

    The result also has `name`, what LM Studio calls it, and `notes`. Raises as `export_hf`, and ModelError where LM
    Studio has no folder here.
    """
    out = lmstudio.place(registry.find(adapter).name) if out is None else out
    opened, stored = sources(model, adapter, out, force)
    place = out.resolve()
    name, system = f"{place.parent.name}/{place.name}", trained(stored).system
    notes = [f"it was trained with this system prompt, which LM Studio has to be given: {system}"] if system else []
    use = [f"LM Studio lists it as {name}", *notes]
    form = Form("mlx", "MLX model, fused", bits, lambda model, arrays: arrays, check_in_mlx, use)
    return _export(opened, stored, out, form, data, force, progress) | {"name": name, "notes": notes}


def _export(
    opened: OpenModel, stored: StoredAdapter, out: Path, form: Form, data: str | None, force: bool, progress: OnFile
) -> dict[str, Any]:
    before = reference(opened, stored, data, progress=progress)
    with paths.written_whole(out, force=force) as folder:
        fused = _written(folder, opened, stored, form, force, progress)
        unchecked, checked = limits.too_large(fused.bytes), None
        if not unchecked:
            progress("running what was written", None)
            checked = form.check(folder, before)
            gate.refuse_lost(checked, force=force)
        more = {"unchecked": unchecked, "bits": fused.bits, "bytes": fused.bytes}
        survived = {"delta_survival": fused.delta_survival, "carried": fused.extras.as_dict()}
        report = record(folder / RECORD, form.format, opened, stored, checked, **more, **survived)
        said = card(
            stored.manifest, name=stored.name, form=form.title, base=opened.path, checked=said_of(report), use=form.use
        )
        with paths.created(folder / CARD) as stream:
            stream.write(said.encode())
    return {"out": str(out)} | report


def _written(
    folder: Path, opened: OpenModel, stored: StoredAdapter, form: Form, force: bool, progress: OnFile
) -> Fused:
    """Write the fused model's files into `folder`."""

    def open_stored() -> LoadedModel:
        return registry.open_stored(opened, [stored], lazily=True)

    advance = progress("writing layers", None)
    fused = fuse(
        open_stored, stored, folder / "model", bits=form.bits, force=force, renamed=form.renamed, on_module=advance
    )
    for file in (folder / "model").iterdir():
        file.rename(folder / file.name)
    (folder / "model").rmdir()
    hf.as_one_of_several(folder)
    if stored.chat_template is not None:
        chat_templates.give(folder, stored.chat_template, stored.manifest.answer_end)
    return fused


def check_in_transformers(folder: Path, before: Reference) -> gate.Checked:
    """What transformers says of the directory, or mlx_lm where there is no torch to run transformers."""
    if not hf.transformers_here():
        return check_in_mlx(folder, before)
    found = hf.top_tokens(folder, before.prompts, count=gate.COUNT * 10)
    return gate.check("transformers", before.live, before.base, found)


def check_in_mlx(folder: Path, before: Reference) -> gate.Checked:
    """What mlx_lm's model of the directory says."""
    found = gate.top_tokens(load(folder).model, before.asked, count=gate.COUNT * 10)
    mx.clear_cache()
    return gate.check("mlx_lm", before.live, before.base, found)
