"""One module of a PEFT adapter: its tensors held against rank, configuration and the base's layer.

Each function raises AdapterError with all that is wrong with its module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlx_lora.adapters.base import EMBEDDINGS, LINEARS, layer_shape
from mlx_lora.adapters.ia3 import is_feed_forward
from mlx_lora.errors import AdapterError
from mlx_lora.interop.neutral import Array, Module
from mlx_lora.interop.peft.config import Settings
from mlx_lora.interop.peft.experts import parted, unstacked
from mlx_lora.interop.peft.names import TURNS, Names

Group = Mapping[str, Array]


def module_of(settings: Settings, names: Names, path: str, ours: str, group: Group) -> Module:
    """The module that transformers has at `path` and mlx_lm at `ours`, of its tensors by the end of their names."""
    layer = names.modules[ours]
    if not settings.targets(path, linear=isinstance(layer, LINEARS), head=names.is_head(ours)):
        raise AdapterError(f"{path} has tensors, and the configuration doesn't name it: PEFT would ignore them")
    if isinstance(layer, EMBEDDINGS):
        return _embedding(settings, names, path, layer, group)
    if not isinstance(layer, LINEARS):
        raise AdapterError(
            f"{path}: PEFT has adapters on linear layers and embeddings, not on a {type(layer).__name__}"
        )
    if settings.method == "vera":
        return _vera(settings, path, layer, group)
    if settings.method == "ia3":
        return _ia3(settings, path, layer, group, columns=is_feed_forward(ours))
    return _linear(settings, path, layer, group)


def _linear(settings: Settings, path: str, layer: Any, group: Group) -> Module:
    outputs, inputs = layer_shape(layer)
    rank, scale = settings.rank_of(path), settings.scale_of(path)
    size = settings.values["qalora_group_size"] if settings.method == "qalora" else 1
    if inputs % size:
        raise AdapterError(f"{path}: its {inputs} inputs can't be cut into groups of {size} (qalora_group_size)")
    shapes: dict[str, tuple[int, ...]] = {"lora_A": (rank, inputs // size), "lora_B": (outputs, rank)}
    if settings.method == "dora":
        shapes["lora_magnitude_vector"] = (outputs,)
    _require(path, group, shapes)
    a, b = group["lora_A"], group["lora_B"]
    if settings.method == "qalora":  # PEFT multiplies the mean of a group by the number of groups
        return Module("linear", a, b, scale * (inputs // size), group_size=size)
    extras = {"magnitude": group["lora_magnitude_vector"]} if settings.method == "dora" else {}
    return Module("linear", a, b, scale, extras)


def _embedding(settings: Settings, names: Names, path: str, layer: Any, group: Group) -> Module:
    if settings.method != "lora":
        raise AdapterError(f"{path}: PEFT's {settings.method} of an embedding is another formula than ours, or none")
    if names.tied():
        raise AdapterError(
            f"{path}: PEFT's LoRA of an embedding is on the input alone; in this base the head is the same embedding, "
            "and it would be on both"
        )
    vocabulary, dim = layer_shape(layer)
    rank = settings.rank_of(path)
    _require(path, group, {"lora_embedding_A": (rank, vocabulary), "lora_embedding_B": (dim, rank)})
    return Module("embedding", group["lora_embedding_A"], group["lora_embedding_B"], settings.scale_of(path))


def _vera(settings: Settings, path: str, layer: Any, group: Group) -> Module:
    outputs, _ = layer_shape(layer)
    _require(path, group, {"vera_lambda_b": (outputs,), "vera_lambda_d": (settings.values["r"],)})
    return Module("linear", extras={"vera_b": group["vera_lambda_b"], "vera_d": group["vera_lambda_d"]})


def _ia3(settings: Settings, path: str, layer: Any, group: Group, *, columns: bool) -> Module:
    outputs, inputs = layer_shape(layer)
    if settings.feeds_forward(path) != columns:
        ours, theirs = ("inputs", "outputs") if columns else ("outputs", "inputs")
        raise AdapterError(
            f"{path}: its IA³ multiplies {theirs} (feedforward_modules), and ours {ours} of such a layer"
        )
    _require(path, group, {"ia3_l": (1, inputs) if columns else (outputs, 1)})
    return Module("linear", extras={"vector": group["ia3_l"].reshape(-1)}, columns=columns)


def stacked_experts(settings: Settings, names: Names, path: str, group: Group) -> dict[str, Module]:
    """Experts that transformers stacks, by mlx_lm's paths. PEFT nests a wrapper for each parameter, down outermost."""
    block = path.removesuffix(".base_layer")
    parts = names.experts(block)
    if not parts:
        raise AdapterError(f"{path}: the base has no such experts")
    wanted = [name for name in ("gate_up_proj", "down_proj") if settings.targets_parameter(f"{block}.{name}")]
    inner = path != block
    if len(wanted) < (2 if inner else 1) or settings.method != "lora":
        raise AdapterError(f"{path} has tensors, and the configuration has no target_parameters for them")
    parameter = f"{block}.{wanted[0 if inner else -1]}"
    is_down = parameter.endswith("down_proj")
    experts, outputs, inputs = layer_shape(names.modules[parts["down_proj" if is_down else "up_proj"]])
    rank, scale = settings.rank_of(parameter), settings.scale_of(parameter)
    rows = outputs if is_down else 2 * outputs
    _require(path, group, {"lora_A": (experts * rank, inputs), "lora_B": (rows, rank * experts)})
    a, b = unstacked(group["lora_A"], group["lora_B"], experts)
    if is_down:
        return {parts["down_proj"]: Module("experts", a, b, scale)}
    pairs = parted(a, b, turns=names.kind in TURNS)
    return {parts[name]: Module("experts", *pair, scale) for name, pair in pairs.items()}


def single_experts(
    settings: Settings, names: Names, block: str, part: str, experts: dict[int, tuple[str, Group]]
) -> dict[str, Module]:
    """Experts with a pair of factors each, as before transformers 5: number -> path and tensors."""
    ours = names.experts(block).get(part)
    if ours is None or settings.method != "lora":
        why = "the base has no such experts" if ours is None else f"{settings.method} on experts isn't supported"
        raise AdapterError(f"{block}.…{part}: {why}")
    count, outputs, inputs = layer_shape(names.modules[ours])
    if sorted(experts) != list(range(count)):
        raise AdapterError(f"{block}: the file has {part} of {len(experts)} experts, and the base has {count}")
    paths = [experts[number][0] for number in range(count)]
    kinds = {(settings.rank_of(path), settings.scale_of(path)) for path in paths}
    if len(kinds) > 1:
        raise AdapterError(f"{block}: {part} has several ranks or scales, and all experts have one here")
    ((rank, scale),) = kinds
    for path, group in experts.values():
        _require(path, group, {"lora_A": (rank, inputs), "lora_B": (outputs, rank)})
    a, b = (np.stack([experts[number][1][name] for number in range(count)]) for name in ("lora_A", "lora_B"))
    return {ours: Module("experts", a, b, scale)}


def _require(path: str, group: Group, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise AdapterError unless a module has just these arrays."""
    faults = [f"{path}.{name} is missing" for name in shapes if name not in group]
    faults += [f"{path}.{name} has no place on this layer" for name in group if name not in shapes]
    faults += [
        f"{path}.{name} has shape {group[name].shape}, and rank and base need {shape}"
        for name, shape in shapes.items()
        if name in group and group[name].shape != shape
    ]
    if faults:
        raise AdapterError("\n  ".join(faults))
