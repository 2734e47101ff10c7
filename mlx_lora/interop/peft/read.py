"""A PEFT adapter directory as `Neutral`: every tensor is understood and fits the base, or is refused by name.

PEFT itself ignores tensors that it doesn't expect and starts anew what is missing. Both are faults here: a module with
half of its factors, a tensor that the configuration has no module for, and a target without tensors.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.adapters.base import EMBEDDINGS, LINEARS, layer_shape
from mlx_lora.adapters.qalora import group_size
from mlx_lora.errors import AdapterError
from mlx_lora.interop.neutral import Array, Module, Neutral, expanded
from mlx_lora.interop.peft.config import CONFIG, WEIGHTS, Settings, read_settings
from mlx_lora.interop.peft.modules import Group, module_of, single_experts, stacked_experts
from mlx_lora.interop.peft.names import OLD_PARTS, Names, theirs_of
from mlx_lora.quant.quantize import dequantize_layer
from mlx_lora.store.adapter import read_arrays
from mlx_lora.store.fitting import PAIR, listed

# The name of a tensor: the module's path, and which of its arrays it is.
_TENSOR = re.compile(
    r"base_model\.model\.(?P<path>.+?)\.(?P<array>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(\.weight)?|vera_lambda_b|vera_lambda_d|ia3_l|base_layer\.weight|weight)"
)
_SHARED = {f"base_model.{name}": name for name in PAIR}
_COPIES = ("base_layer", "weight")
# The arrays that a module of each method has.
_ARRAYS: dict[str, tuple[str, ...]] = {
    "lora": ("lora_A", "lora_B"),
    "qalora": ("lora_A", "lora_B"),
    "dora": ("lora_A", "lora_B", "lora_magnitude_vector"),
    "vera": ("vera_lambda_b", "vera_lambda_d"),
    "ia3": ("ia3_l",),
}
_EXPERT = re.compile(r"(?P<block>.+\.experts)\.(?P<number>\d+)\.(?P<part>\w+)")
# How far a stored copy of the embedding may be from the base's: another dtype, or a packed base.
_ROUNDED, _PACKED = 0.01, 0.35
# Scales that are equal but for float64's rounding of a quotient.
_SAME_SCALE = 1e-15


def read(folder: Path, model: nn.Module, config: dict[str, Any]) -> Neutral:
    """The adapter in `folder`, by the paths of `model`, whose config.json is `config`.

    Raises one AdapterError with all that isn't understood or doesn't fit. Of the base's weights it reads those alone
    of which the file has a copy, as PEFT stores one of an adapted embedding.
    """
    settings, names = read_settings(folder), Names(model, config)
    groups, shared, faults = _groups(_arrays(folder), settings.method)
    modules: dict[str, Module] = {}
    experts: dict[tuple[str, str], dict[int, tuple[str, Group]]] = {}
    for path, group in groups.items():
        with _kept(faults):
            if expert := _EXPERT.fullmatch(path):
                part = OLD_PARTS.get(expert["part"], expert["part"])
                experts.setdefault((expert["block"], part), {})[int(expert["number"])] = (path, group)
            elif path.endswith((".experts", ".experts.base_layer")):
                modules |= stacked_experts(settings, names, path, group)
            else:
                modules |= _single(settings, names, path, group)
    for (block, part), numbered in experts.items():
        with _kept(faults):
            modules |= single_experts(settings, names, block, part, numbered)
    faults += [] if faults else _untouched(settings, names, modules)
    faults += [] if faults or modules else ["the file has no tensors of an adapter"]
    if settings.method == "vera" and not faults:
        faults += _misfits(shared, settings, [names.shape(path) for path in modules])
    if faults:
        raise AdapterError(
            f"{folder}: can't be used with this base:\n  {listed(faults)}",
            hint="is this the right base, and is the adapter whole?",
        )
    ordered = {path: modules[path] for path in names.modules if path in modules}
    return _grouped(Neutral(settings.method, _evened(ordered), shared), names)


@contextmanager
def _kept(faults: list[str]) -> Iterator[None]:
    """Keep what is wrong with a module, and go on with the next one."""
    try:
        yield
    except AdapterError as error:
        faults.append(error.message)


def _arrays(folder: Path) -> dict[str, Array]:
    """The tensors of the file by name, float32. Raises AdapterError for other types, and for what isn't finite."""
    file = folder / WEIGHTS
    if not file.is_file():
        others = sorted(path.name for path in folder.glob("adapter_model.*"))
        hint = "a .bin is a pickle and never opened; PEFT's save_pretrained writes safetensors" if others else None
        raise AdapterError(f"{folder}: has a {CONFIG} of PEFT, and no {WEIGHTS}", hint=hint)
    found, faults = {}, []
    for name, array in read_arrays(file).items():
        if not mx.issubdtype(array.dtype, mx.floating):
            faults.append(f"{name} is of type {str(array.dtype).rpartition('.')[2]}, not a float")
        elif not mx.isfinite(array).all().item():
            faults.append(f"{name} holds NaN or infinity")
        else:
            found[name] = np.array(array.astype(mx.float32))
    if not found and not faults:
        faults.append("it holds no tensors")
    if faults:
        raise AdapterError(f"{file}:\n  {listed(faults)}", hint="train it again, or restore it from a copy")
    return found


def _evened(modules: dict[str, Module]) -> dict[str, Module]:
    """Modules whose scales differ by rounding alone get one scale: α/r isn't exact for every r."""
    usual = Counter(module.scale for module in modules.values()).most_common(1)[0][0]
    return {
        path: replace(module, scale=usual) if math.isclose(module.scale, usual, rel_tol=_SAME_SCALE) else module
        for path, module in modules.items()
    }


def _grouped(neutral: Neutral, names: Names) -> Neutral:
    """QA-LoRA with the base's own groups, which PEFT's must be whole numbers of; else as the LoRA that it equals."""
    if neutral.method != "qalora":
        return neutral
    sizes = {path: group_size(names.modules[path]) for path in neutral.modules}
    if any(module.group_size is None or module.group_size % sizes[path] for path, module in neutral.modules.items()):
        return Neutral("lora", {path: expanded(module) for path, module in neutral.modules.items()})
    return Neutral("qalora", {path: regrouped(module, sizes[path]) for path, module in neutral.modules.items()})


def regrouped(module: Module, size: int) -> Module:
    """QA-LoRA's module with groups of `size`, which divides its own: a mean over more inputs is a mean of means."""
    assert module.a is not None and module.group_size is not None
    times = module.group_size // size
    return replace(module, a=np.repeat(module.a, times, axis=-1) / np.float32(times), group_size=size)


def _groups(arrays: dict[str, Array], method: str) -> tuple[dict[str, dict[str, Array]], dict[str, Array], list[str]]:
    """Tensors by module and by the end of their names, tensors of the whole adapter, and those of neither kind."""
    groups: dict[str, dict[str, Array]] = {}
    shared, faults = {}, []
    for name, array in arrays.items():
        found = _TENSOR.fullmatch(name)
        end = found["array"].removesuffix(".weight") if found else ""
        if name in _SHARED and method == "vera":
            shared[_SHARED[name]] = array
        elif found and (end in _COPIES or end.replace("lora_embedding", "lora") in _ARRAYS[method]):
            groups.setdefault(found["path"], {})[end] = array
        else:
            faults.append(f"{name} is no tensor of a {method} adapter")
    return groups, shared, faults


def _single(settings: Settings, names: Names, path: str, group: dict[str, Array]) -> dict[str, Module]:
    """The module of a linear layer or an embedding by mlx_lm's path; nothing for a mere copy of the base's weight."""
    ours = names.ours(path)
    if ours is None and path.endswith("lm_head") and names.tied() and group.keys() <= set(_COPIES):
        ours = names.embedding()  # a copy of the head is one of the embedding
    if ours is None:
        if group.keys() <= set(_COPIES):
            raise AdapterError(f"{path}.{next(iter(group))} is no tensor of a {settings.method} adapter")
        if path.endswith("lm_head") and names.tied():
            raise AdapterError(f"{path}: the base's head is its embedding, and has no adapter of its own")
        raise AdapterError(f"{path}: the base has no such layer")
    own = dict(group)
    for name in _COPIES:
        if name in own:
            _check_copy(path, names.modules[ours], own.pop(name))
    return {ours: module_of(settings, names, path, ours, own)} if own else {}


def _check_copy(path: str, layer: Any, copy: Array) -> None:
    """PEFT stores an adapted embedding's weight too. One that isn't the base's would have an effect of its own."""
    if not isinstance(layer, (*EMBEDDINGS, *LINEARS)) or copy.shape != layer_shape(layer):
        raise AdapterError(f"{path}: the file has a weight {copy.shape} of its own for it, and not the base's")
    weight = np.array(dequantize_layer(layer, mx.float32))
    most = _PACKED if "scales" in layer else _ROUNDED
    if np.linalg.norm(weight - copy) > most * np.linalg.norm(weight):
        raise AdapterError(f"{path}: the file has a weight of its own for it, trained or of another base")


def _untouched(settings: Settings, names: Names, modules: dict[str, Module]) -> list[str]:
    """Linear layers that the configuration names, and of which the file has no tensor: it isn't whole."""
    if settings.values["target_modules"] is None:
        return []
    return [
        f"{path} is a target of the configuration, and the file has no tensors for it"
        for path in names.expected()
        if path not in modules
        and any(settings.targets(name, linear=True, head=names.is_head(path)) for name in theirs_of(path))
    ]


def _misfits(shared: dict[str, Array], settings: Settings, shapes: list[tuple[int, ...]]) -> list[str]:
    """What is wrong with VeRA's pair for weights of these shapes."""
    if len(shared) < len(PAIR):
        return ["vera_A and vera_B aren't in the file: PEFT drew them with torch's generator (save_projection: false)"]
    rank, (a, b) = settings.values["r"], (shared[name].shape for name in PAIR)
    faults = []
    if len(a) != 2 or a[0] != rank or a[1] < max(shape[1] for shape in shapes):
        faults.append(f"vera_A has shape {a}, and rank and base need {(rank, max(shape[1] for shape in shapes))}")
    if len(b) != 2 or b[1] != rank or b[0] < max(shape[0] for shape in shapes):
        faults.append(f"vera_B has shape {b}, and rank and base need {(max(shape[0] for shape in shapes), rank)}")
    return faults
