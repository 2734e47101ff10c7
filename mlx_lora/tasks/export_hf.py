"""Export base and adapter, fused, as a half-precision directory that transformers loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_lora import paths
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.interop import gate, hf
from mlx_lora.interop.card import CARD, card, said_of
from mlx_lora.interop.fuse import Fused, fuse
from mlx_lora.machine import limits
from mlx_lora.models import chat_templates
from mlx_lora.models.load import LoadedModel, load
from mlx_lora.store import registry
from mlx_lora.store.adapter import StoredAdapter, read
from mlx_lora.store.base import base_for
from mlx_lora.tasks.export_check import RECORD, Reference, record, reference

FORM = "Half-precision model for transformers, fused"


def export_hf(
    model: str | None,
    adapter: str,
    out: Path,
    *,
    data: str | None = None,
    force: bool = False,
    progress: OnFile = silent,
) -> dict[str, Any]:
    """Merge `adapter` into `model` (by default its own base) and write `out`, checked by transformers where it runs.

    Returns what is kept in export.json. Raises before anything is written when `out` exists or transformers' names of
    the architecture aren't known, and CannotFuse, leaving nothing, where the adapter isn't in what was written.
    """
    paths.check_target(out, force=force)
    stored = read(registry.find(adapter))
    opened = base_for(model, [stored])
    paths.check_apart(out, model=opened.path, adapter=stored.path)

    def open_stored() -> LoadedModel:
        return registry.open_stored(opened, [stored], lazily=True)

    hf.check(open_stored().model)
    before = reference(opened, stored, data, progress=progress)
    with paths.written_whole(out, force=force) as folder:
        fused = _written(folder, open_stored, stored, force, progress)
        unchecked = limits.too_large(fused.bytes)
        checked = None if unchecked else _check(folder, before, progress)
        if checked is not None:
            gate.refuse_lost(checked, force=force)
        more = {"unchecked": unchecked, "bytes": fused.bytes, "delta_survival": fused.delta_survival}
        carried = {"carried": fused.extras.as_dict()}
        report = record(folder / RECORD, "hf", opened, stored, checked, **more, **carried)
        with paths.created(folder / CARD) as stream:
            said = card(stored.manifest, name=stored.name, form=FORM, base=opened.path, checked=said_of(report))
            stream.write(said.encode())
    return {"out": str(out)} | report


def _written(
    folder: Path, open_stored: Callable[[], LoadedModel], stored: StoredAdapter, force: bool, progress: OnFile
) -> Fused:
    """Write the fused model's files into `folder`, as transformers names them."""
    advance = progress("writing layers", None)
    fused = fuse(open_stored, stored, folder / "model", bits="16", force=force, renamed=hf.renamed, on_module=advance)
    for file in (folder / "model").iterdir():
        file.rename(folder / file.name)
    (folder / "model").rmdir()
    hf.as_one_of_several(folder)
    if stored.chat_template is not None:
        chat_templates.give(folder, stored.chat_template, stored.manifest.answer_end)
    return fused


def _check(folder: Path, before: Reference, progress: OnFile) -> gate.Checked:
    """What transformers says of the directory, or mlx_lm where there is no torch to run transformers."""
    advance = progress("running what was written", None)
    if hf.transformers_here():
        found = hf.top_tokens(folder, before.prompts, count=gate.COUNT * 10)
        advance()
        return gate.check("transformers", before.live, before.base, found)
    found = gate.top_tokens(load(folder).model, before.asked, count=gate.COUNT * 10)
    mx.clear_cache()
    advance()
    return gate.check("mlx_lm", before.live, before.base, found)
