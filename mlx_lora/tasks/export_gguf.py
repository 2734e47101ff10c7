"""Export an adapter for llama.cpp: as a GGUF adapter, or merged with its base as a GGUF model.

Everything that can be refused is refused before a model is run or a file begun. What was written is run by llama.cpp
before it takes its name, and compared with the live base and adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from gguf import GGMLQuantizationType as Kind

from mlx_lora import paths
from mlx_lora.adapters.attach import Wrappers
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.errors import AdapterError, CannotFuse, MlxLoraError, ModelError
from mlx_lora.interop import gate
from mlx_lora.interop.gguf import adapter as codec
from mlx_lora.interop.gguf import llama_types, program
from mlx_lora.interop.gguf.model import Merged, entries_of, kinds_for, write_model
from mlx_lora.interop.gguf.plan import Plan, plan_of
from mlx_lora.interop.gguf.tokenizer import tokenizer_fields
from mlx_lora.interop.gguf.types import PLAIN, Form, form_of
from mlx_lora.interop.gguf.writing import check_file, written_beside
from mlx_lora.interop.nearest_lora import as_lora
from mlx_lora.interop.neutral import Neutral, from_wrappers
from mlx_lora.machine import limits
from mlx_lora.models.load import LoadedModel
from mlx_lora.models.open import OpenModel
from mlx_lora.store import registry
from mlx_lora.store.adapter import StoredAdapter, read, wrappers_for
from mlx_lora.store.base import base_for
from mlx_lora.tasks.export_check import Reference, record, reference

LEAST_KEPT, MOST_KEPT = 0.5, 1.5
BASE = "base.gguf"  # a temporary file
UNCHECKED = f"llama.cpp isn't there to run it ({program.HOW})"
# What a base is written as for llama.cpp to run an adapter over, by what its files hold.
BASE_TYPES = {mx.float32: "f32", mx.bfloat16: "bf16"}


@dataclass(frozen=True)
class Subject:
    """What is exported: the adapter and its base, found and checked, and what its GGUF file is."""

    opened: OpenModel
    adapter: StoredAdapter
    plan: Plan

    def open_stored(self) -> LoadedModel:
        """The base with its tensors as on disk and unread."""
        return registry.open_stored(self.opened, [self.adapter], lazily=True)

    @property
    def about(self) -> dict[str, Any]:
        """Metadata that names what is in the file."""
        base = registry.base_name(self.opened.path)
        return {"general.name": self.adapter.name, "general.base_model.count": 1, "general.base_model.0.name": base}


def export_gguf(
    model: str | None,
    adapter: str,
    out: Path,
    *,
    fused: bool = False,
    type_name: str = "f16",
    rank: int | None = None,
    data: str | None = None,
    force: bool = False,
    progress: OnFile = silent,
) -> dict[str, Any]:
    """Write `adapter` as the file `out`, beside it what was checked; return that, with the file as `out`.

    `fused` merges it into `model` (by default its own base) with weights of `type_name`; otherwise the file is an
    adapter, of the nearest LoRA of at most `rank` where that is given. Raises before anything is written where the file
    exists, the architecture or the type can't be written, or the adapter has no such form; CannotFuse, leaving
    nothing, where the adapter isn't in what was written.
    """
    if out.suffix != ".gguf":
        raise ModelError(f"{out} doesn't end in .gguf", hint=f"--out {out.with_suffix('.gguf').name}")
    for file in (out, record_of(out)):
        check_file(file, force=force)
    form = form_of(type_name)
    stored = read(registry.find(adapter))
    opened = base_for(model, [stored])
    paths.check_apart(out, model=opened.path, adapter=stored.path)
    subject = Subject(opened, stored, plan_of(opened.config))
    if fused:
        return _export_model(subject, out, form, data, force, progress)
    return _export_adapter(subject, out, rank, data, force, progress)


def record_of(out: Path) -> Path:
    """Where it is kept what was exported and how it was checked."""
    return out.with_suffix(".export.json")


def _export_model(
    subject: Subject, out: Path, form: Form, data: str | None, force: bool, progress: OnFile
) -> dict[str, Any]:
    llama_types.check(form)
    base = subject.open_stored()
    entries_of(base.model, wrappers_for(base.model, subject.adapter), subject.plan, form)
    fields = _fields(subject)
    before = _reference(subject, data, progress)
    with written_beside(out, force=force) as folder:
        kinds = _kinds(subject, form, progress)
        base = subject.open_stored()
        wrappers = wrappers_for(base.model, subject.adapter)
        merged = _written(subject, base, wrappers, form, fields, folder / out.name, progress, kinds)
        if not LEAST_KEPT <= merged.kept <= MOST_KEPT and not force:
            raise CannotFuse(
                f"{max(merged.kept, 0):.0%} of the adapter's update is in the file's weights as {form.name}; the model "
                "would not have learned what the adapter did",
                hint="--type q8_0 or f16 keeps more of it; --force writes the file anyway",
            )
        size = (folder / out.name).stat().st_size
        checked, unchecked = None, UNCHECKED if before is None else limits.too_large(size)
        if before is not None and not unchecked:
            found = _run(before, folder / out.name, None, progress)
            plain = _without(subject, form, fields, folder, before, progress, kinds)
            checked = gate.check("llama.cpp", before.live, before.base, found, plain=plain)
            gate.refuse_lost(checked, force=force)
        more = {
            "unchecked": unchecked, "type": form.name, "bytes": size, "weights_kept": merged.kept,
            "tensors": merged.kinds,
        }  # fmt: skip
        kept = folder / record_of(out).name
        return {"out": str(out)} | record(kept, "gguf", subject.opened, subject.adapter, checked, **more)


def _export_adapter(
    subject: Subject, out: Path, rank: int | None, data: str | None, force: bool, progress: OnFile
) -> dict[str, Any]:
    base = subject.open_stored()
    wrappers = wrappers_for(base.model, subject.adapter)
    neutral, error = _neutral(wrappers, rank, progress)
    codec.check(neutral, subject.plan)
    form = form_of(BASE_TYPES.get(base.stored, "f16"))
    del base, wrappers
    before = _reference(subject, data, progress)
    with written_beside(out, force=force) as folder:
        codec.write_adapter(neutral, subject.plan, folder / out.name, about=subject.about)
        checked: gate.Checked | None = None
        unchecked: str | None = UNCHECKED
        if before is not None:
            unchecked = _base_written(subject, form, folder / BASE, progress)
        if before is not None and not unchecked:
            found = _run(before, folder / BASE, folder / out.name, progress)
            checked = gate.check("llama.cpp", before.live, before.base, found)
            gate.refuse_lost(checked, force=force)
        (folder / BASE).unlink(missing_ok=True)
        size = (folder / out.name).stat().st_size
        more = {"unchecked": unchecked, "bytes": size, "relative_error": error, "modules": len(neutral.modules)}
        kept = folder / record_of(out).name
        return {"out": str(out)} | record(kept, "gguf-adapter", subject.opened, subject.adapter, checked, **more)


def _neutral(wrappers: Wrappers, rank: int | None, progress: OnFile) -> tuple[Neutral, float]:
    if rank is not None:
        return as_lora(wrappers, rank, on_module=progress("finding the nearest LoRA", len(wrappers)))
    try:
        return from_wrappers(wrappers), 0.0
    except AdapterError as fault:
        raise AdapterError(f"{fault.message}: llama.cpp has no such adapter", hint=fault.hint) from None


def _kinds(subject: Subject, form: Form, progress: OnFile) -> dict[str, Kind]:
    """Formats of merged weights that `form` would lose the update of; llama.cpp's own formats are its own business."""
    if form.by_llama_cpp or form.kind in PLAIN:
        return {}
    base = subject.open_stored()
    wrappers = wrappers_for(base.model, subject.adapter)
    advance = progress("measuring what the format keeps", len(wrappers))
    return kinds_for(base, wrappers, subject.plan, form, on_module=advance)


def _fields(subject: Subject) -> dict[str, Any]:
    """Metadata of the tokenizer and the names; the template that the adapter was trained with is the file's."""
    rows = subject.plan.fields[f"{subject.plan.architecture}.vocab_size"]
    adapter = subject.adapter
    words = tokenizer_fields(
        subject.opened.tokenizer,
        rows,
        chat_template=adapter.chat_template,
        answer_end=adapter.manifest.answer_end,
    )
    return subject.about | words


def _reference(subject: Subject, data: str | None, progress: OnFile) -> Reference | None:
    """What base and adapter say; None where llama.cpp isn't there to be compared with them."""
    return reference(subject.opened, subject.adapter, data, progress=progress) if program.installed() else None


def _written(
    subject: Subject,
    base: LoadedModel,
    wrappers: Wrappers,
    form: Form,
    fields: dict[str, Any],
    file: Path,
    progress: OnFile,
    kinds: dict[str, Kind] | None = None,
) -> Merged:
    """Write a whole model to `file`, by llama.cpp from a model in f16 where that is what makes the format."""
    target = file.with_name("f16.gguf") if form.by_llama_cpp else file
    here = form_of("f16") if form.by_llama_cpp else form
    count = len(entries_of(base.model, wrappers, subject.plan, here))
    advance = progress("writing tensors", count)
    merged = write_model(base, wrappers, subject.plan, here, fields, target, kinds=kinds, on_tensor=advance)
    if form.by_llama_cpp:
        progress(f"making {form.name}", None)
        llama_types.quantize(target, file, form)
        target.unlink()
    return merged


def _without(
    subject: Subject,
    form: Form,
    fields: dict[str, Any],
    folder: Path,
    before: Reference,
    progress: OnFile,
    kinds: dict[str, Kind],
) -> gate.TopTokens | None:
    """What the base alone says in a quantized format; None for f32, f16 and bf16, which change nothing to speak of."""
    if form.name in ("f32", "f16", "bf16"):
        return None
    file = folder / BASE
    _written(subject, subject.open_stored(), {}, form, fields, file, progress, kinds)
    found = _run(before, file, None, progress)
    file.unlink()
    return found


def _base_written(subject: Subject, form: Form, file: Path, progress: OnFile) -> str | None:
    """Write the base for llama.cpp to run the adapter over; why that can't be done, or None."""
    try:
        _written(subject, subject.open_stored(), {}, form, _fields(subject), file, progress)
    except MlxLoraError as fault:  # the adapter has none of what is at fault here, such as a tokenizer
        return f"its base can't be written as GGUF: {fault.message}"
    return limits.too_large(file.stat().st_size)


def _run(before: Reference, file: Path, adapter: Path | None, progress: OnFile) -> gate.TopTokens:
    advance = progress("running llama.cpp", len(before.prompts))
    return program.top_tokens(file, before.prompts, gate.COUNT * 10, adapter, on_prompt=advance)
