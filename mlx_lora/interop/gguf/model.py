"""A base and its adapter merged into one GGUF file that llama.cpp runs.

One module at a time is read, merged, put into llama.cpp's form, quantized, written and freed, so the base is never
whole in memory, and nor is the result. Every array of the model must have a tensor in the file: what has none is
refused before the file is begun.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from mlx_lora import paths
from mlx_lora.adapters.attach import Wrappers
from mlx_lora.adapters.targets import bare_modules
from mlx_lora.errors import CannotFuse, ModelError
from mlx_lora.interop.gguf.packed import exactly
from mlx_lora.interop.gguf.plan import Plan
from mlx_lora.interop.gguf.types import PLAIN, Form, decoded, encoded, kind_of, stored_bytes
from mlx_lora.interop.gguf.writing import write_header
from mlx_lora.models.gguf.tensors import Tensor
from mlx_lora.models.load import LoadedModel
from mlx_lora.quant.quantize import dequantize_layer, named_arrays

# How far from 1 the share of its update may be that a weight has in a format.
OFF = 0.1
# Arrays of a packed layer beside its weight.
PACKED = ("scales", "biases", "global_scale")


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its whole name, the array of MLX that it comes from, its shape and its format."""

    name: str
    tensor: Tensor
    parameter: str
    shape: tuple[int, ...]
    kind: Kind


@dataclass(frozen=True)
class Merged:
    """What was written. `kept` is `Kept.share`, `kinds` counts the tensors of each format."""

    bytes: int
    kept: float
    kinds: dict[str, int]


def entries_of(model: nn.Module, wrappers: Wrappers, plan: Plan, form: Form) -> list[Entry]:
    """The file's tensors for a bare model and what is merged into it; reads no weights.

    Raises ModelError or CannotFuse naming every array that has no tensor or another shape, and every wrapper that has
    no merged form.
    """
    modules, entries, used = bare_modules(model), list[Entry](), set[str]()
    for path, tensors in plan.tensors.items():
        if path not in modules:
            raise ModelError(f"the model has no {path}, which a GGUF file of {plan.architecture} needs")
        layer = wrappers[path].fuse() if path in wrappers else modules[path]
        for tensor in tensors:
            entries += _of_tensor(tensor, layer, plan, form)
        used |= {f"{path}.{entry.parameter}" for entry in entries if entry.tensor.path == path}
        used |= {f"{path}.{name}" for name in PACKED}
    strange = [path for path in wrappers if path not in plan.tensors]
    strange += [name for name, _ in named_arrays(model) if name not in used]
    if strange:
        more = f" … and {len(strange) - 8} more" if len(strange) > 8 else ""
        raise CannotFuse(
            f"a GGUF file of {plan.architecture} has no place for {', '.join(strange[:8])}{more}",
            hint="`mlx-lora fuse` merges into an MLX model",
        )
    return entries


def _of_tensor(tensor: Tensor, layer: nn.Module, plan: Plan, form: Form) -> Iterator[Entry]:
    yield Entry(f"{tensor.name}.weight", tensor, tensor.parameter, tensor.shape, kind_of(tensor, form, tied=plan.tied))
    if tensor.parameter == "weight" and tensor.bias != "never" and "bias" in layer:
        yield Entry(f"{tensor.name}.bias", tensor, "bias", tensor.shape[:-1], Kind.F32)


def kinds_for(
    stored: LoadedModel,
    wrappers: Wrappers,
    plan: Plan,
    form: Form,
    *,
    on_module: Callable[[], None] = lambda: None,
) -> dict[str, Kind]:
    """Formats by tensor for merged weights whose update `form` would lose or blow up: Q8_0, or F16 where that does too.

    That is so where the base lies on a grid of the same few bits and the update is far below its steps: a block's
    smallest and largest values move by the update, and with them the places of all others, by steps. `stored` and
    `wrappers` serve no more afterwards.
    """
    kinds, modules = dict[str, Kind](), bare_modules(stored.model)
    for entry in entries_of(stored.model, wrappers, plan, form):
        path = entry.tensor.path
        if path not in wrappers or entry.parameter != "weight" or entry.kind in PLAIN:
            continue
        wrapper = wrappers[path]
        values, before = _values(wrapper.fuse(), entry), _values(wrapper.base, entry)
        for kind in dict.fromkeys((entry.kind, Kind.Q8_0, Kind.F16)):
            kinds[entry.name], kept = kind, Kept()
            kept.add(values - before, decoded(encoded(entry.name, values, kind), entry.shape, kind) - before)
            if abs(kept.share - 1) <= OFF:
                break
        _release(modules[path])
        on_module()
        mx.clear_cache()
    return kinds


def write_model(
    stored: LoadedModel,
    wrappers: Wrappers,
    plan: Plan,
    form: Form,
    fields: dict[str, Any],
    out: Path,
    *,
    kinds: Mapping[str, Kind] | None = None,
    on_tensor: Callable[[], None] = lambda: None,
) -> Merged:
    """Write the file. `stored` is a bare base with its tensors unread; it can't run afterwards, nor can `wrappers`.

    `form` is one that is written here, `kinds` has other formats for some tensors, and `fields` is the metadata beside
    the plan's. Raises as `entries_of` before there is a file, ModelError for values that the format can't hold.
    """
    entries = entries_of(stored.model, wrappers, plan, form)
    entries = [replace(entry, kind=(kinds or {}).get(entry.name, entry.kind)) for entry in entries]
    out.parent.mkdir(parents=True, exist_ok=True)
    paths.check_space(out.parent, sum(stored_bytes(entry.shape, entry.kind) for entry in entries))
    kept = Kept()
    writer = gguf.GGUFWriter(out, plan.architecture)
    for name, values in plan.extra.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for entry in entries:
        size = stored_bytes(entry.shape, entry.kind)
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), size, raw_dtype=entry.kind)
    about = {"general.type": "model", "general.file_type": int(form.file_type), "general.quantization_version": 2}
    write_header(writer, about | plan.fields | fields)
    for values in plan.extra.values():
        writer.write_tensor_data(values)
    for data in _data(stored, wrappers, entries, kept):
        writer.write_tensor_data(data)
        on_tensor()
    writer.close()
    return Merged(out.stat().st_size, kept.share, dict(Counter(entry.kind.name for entry in entries)))


def _data(stored: LoadedModel, wrappers: Wrappers, entries: list[Entry], kept: Kept) -> Iterator[NDArray[np.uint8]]:
    """The bytes of every entry in order; each module is freed behind its last one."""
    modules = bare_modules(stored.model)
    for number, entry in enumerate(entries):
        path = entry.tensor.path
        wrapper = wrappers.get(path)
        layer = modules[path] if wrapper is None else wrapper.fuse()
        data = exactly(layer, entry.kind) if entry.parameter == "weight" else None
        if data is not None:
            yield entry.tensor.rows_to_gguf(data)
        else:
            yield _encoded(layer, None if wrapper is None else wrapper.base, entry, kept)
        if number + 1 == len(entries) or entries[number + 1].tensor.path != path:
            for used in {id(each): each for each in (layer, modules[path])}.values():
                _release(used)
            wrappers.pop(path, None)
            mx.clear_cache()


def _encoded(layer: nn.Module, base: nn.Module | None, entry: Entry, kept: Kept) -> NDArray[np.uint8]:
    """The bytes of an array, counted into `kept` where it is a weight merged from `base`."""
    values = _values(layer, entry)
    data = encoded(entry.name, values, entry.kind)
    if base is not None and entry.parameter == "weight":
        before = _values(base, entry)
        kept.add(values - before, decoded(data, entry.shape, entry.kind) - before)
    return data


def _values(layer: nn.Module, entry: Entry) -> NDArray[np.float32]:
    """An array of a layer in the file's form: float32, of the entry's shape."""
    if entry.parameter == "weight":
        weight = dequantize_layer(layer, mx.float32)
        return entry.tensor.weight_to_gguf(np.array(weight)).reshape(entry.shape)
    array = np.array(layer[entry.parameter].astype(mx.float32))
    return entry.tensor.rows_to_gguf(array).reshape(entry.shape)


def _release(layer: nn.Module) -> None:
    """Let go of a layer's own arrays; those of layers inside it are written for themselves."""
    for name, value in layer.items():
        if isinstance(value, mx.array):
            layer[name] = mx.zeros((0,), value.dtype)


class Kept:
    """How much of the update is in the file's weights, over all merged ones: the slope of realised on intended.

    Σ realised·intended / Σ intended². Rounding that has nothing to do with the update leaves it near 1, however coarse;
    where the update is smaller than the steps of a grid that the base lies on, it is 0, or several times too large.
    """

    def __init__(self) -> None:
        self.found = self.meant = 0.0

    def add(self, intended: NDArray[np.float32], realised: NDArray[np.float32]) -> None:
        self.found += float(np.vdot(intended, realised))
        self.meant += float(np.vdot(intended, intended))

    @property
    def share(self) -> float:
        """1 where there is no update."""
        return self.found / self.meant if self.meant else 1.0
