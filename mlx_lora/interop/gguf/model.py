"""A base and its adapter merged into one GGUF file that llama.cpp runs.

One module at a time is read, merged, put into llama.cpp's form, quantized, written and freed, so the base is never
whole in memory, and nor is the result. Every array of the model must have a tensor in the file: what has none is
refused before the file is begun.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from mlx_lora.data.write import files_written
from mlx_lora.errors import CannotFuse, ModelError
from mlx_lora.interop.gguf.plan import Plan
from mlx_lora.interop.gguf.types import Form, decoded, encoded, kind_of, stored_bytes
from mlx_lora.interop.gguf.writing import write_header
from mlx_lora.models.gguf.tensors import Tensor
from mlx_lora.models.layers import release
from mlx_lora.models.load import LoadedModel
from mlx_lora.quant.quantize import dequantize_layer, named_arrays

LEAST_SURVIVAL = 0.5
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
    """What was written. `delta_survival` is the share of the update that the file's weights have, 1 without one.

    `kinds` counts the tensors of each format.
    """

    out: Path
    bytes: int
    delta_survival: float
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
    ending = "" if tensor.parameter != "weight" and tensor.name.endswith(".weight") else ".weight"
    yield Entry(tensor.name + ending, tensor, tensor.parameter, tensor.shape, kind_of(tensor, form, tied=plan.tied))
    if tensor.parameter == "weight" and tensor.bias != "never" and "bias" in layer:
        yield Entry(f"{tensor.name}.bias", tensor, "bias", tensor.shape[:-1], Kind.F32)


def write_model(
    stored: LoadedModel,
    wrappers: Wrappers,
    plan: Plan,
    form: Form,
    fields: dict[str, Any],
    out: Path,
    *,
    force: bool = False,
    on_tensor: Callable[[], None] = lambda: None,
) -> Merged:
    """Write the file. `stored` is a bare base with its tensors unread; it can't run afterwards, nor can `wrappers`.

    `form` is one that is written here. `fields` is the metadata beside the plan's. Raises CannotFuse when less than
    half of the update survives without `force`, and as `entries_of`; then there is no file.
    """
    entries = entries_of(stored.model, wrappers, plan, form)
    out.parent.mkdir(parents=True, exist_ok=True)
    paths.check_space(out.parent, sum(stored_bytes(entry.shape, entry.kind) for entry in entries))
    updates = _Updates()
    with files_written([out]) as opened:
        writer = gguf.GGUFWriter(opened[out].name, plan.architecture)
        for name, values in plan.extra.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        for entry in entries:
            size = stored_bytes(entry.shape, entry.kind)
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), size, raw_dtype=entry.kind)
        about = {"general.type": "model", "general.file_type": int(form.file_type), "general.quantization_version": 2}
        write_header(writer, about | plan.fields | fields)
        for values in plan.extra.values():
            writer.write_tensor_data(values)
        for data in _data(stored, wrappers, entries, updates):
            writer.write_tensor_data(data)
            on_tensor()
        writer.close()
        survived = updates.survival()
        if survived < LEAST_SURVIVAL and not force:
            raise CannotFuse(
                f"only {max(survived, 0):.0%} of the adapter's update survives as {form.name}; the model would not have "
                "learned what the adapter did",
                hint="--type q8_0 or f16 keeps more of it; --force writes the file anyway",
            )
    kinds = Counter(entry.kind.name for entry in entries)
    return Merged(out, out.stat().st_size, survived, dict(kinds))


def _data(
    stored: LoadedModel, wrappers: Wrappers, entries: list[Entry], updates: _Updates
) -> Iterator[NDArray[np.uint8]]:
    """The bytes of every entry in order; each module is freed behind its last one."""
    modules = bare_modules(stored.model)
    for number, entry in enumerate(entries):
        path = entry.tensor.path
        wrapper = wrappers.get(path)
        layer = modules[path] if wrapper is None else wrapper.fuse()
        values = _values(layer, entry)
        data = encoded(entry.name, values, entry.kind)
        if wrapper is not None and entry.parameter == "weight":
            base = _values(wrapper.base, entry)
            updates.add(values - base, decoded(data, entry.shape, entry.kind) - base)
            del base
        del values
        yield data
        if number + 1 == len(entries) or entries[number + 1].tensor.path != path:
            release(layer)
            release(modules[path])
            wrappers.pop(path, None)
            mx.clear_cache()


def _values(layer: nn.Module, entry: Entry) -> NDArray[np.float32]:
    """An array of a layer in the file's form: float32, of the entry's shape."""
    if entry.parameter == "weight":
        weight = dequantize_layer(layer, mx.float32)
        return entry.tensor.weight_to_gguf(np.array(weight)).reshape(entry.shape)
    array = np.array(layer[entry.parameter].astype(mx.float32))
    return entry.tensor.rows_to_gguf(array).reshape(entry.shape)


class _Updates:
    """Sums over all merged weights of what was meant to change and of what the file's values lack of it."""

    def __init__(self) -> None:
        self.lost = self.meant = 0.0

    def add(self, intended: NDArray[np.float32], realised: NDArray[np.float32]) -> None:
        self.lost += float(np.square(realised - intended, dtype=np.float64).sum())
        self.meant += float(np.square(intended, dtype=np.float64).sum())

    def survival(self) -> float:
        """As `measure.survival`: 1 − ‖realised − intended‖ / ‖intended‖."""
        return 1.0 - float(np.sqrt(self.lost / self.meant)) if self.meant else 1.0
