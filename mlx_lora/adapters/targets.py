"""Which modules of a model an adapter wraps: by kind, by name, by expression, by layer; seen through what is attached.

Paths are those of the bare model, whatever is attached to it. Knows nothing about what a wrapper does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora.adapters.base import ADAPTABLE, CONVOLUTIONS, EMBEDDINGS, AdapterLayer
from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError, ModelError, nearest
from mlx_lora.models.trunk.layers import layers_of

# Linears that choose experts rather than transform activations.
ROUTERS = {"gate", "router", "shared_expert_gate", "indexer"}
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def attached(model: nn.Module) -> dict[str, AdapterLayer]:
    """The wrappers on `model`, by the bare path of what they wrap, in the model's order."""
    return {path: module for path, module in _ordered(model) if isinstance(module, AdapterLayer)}


def bare_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the bare model by path, layer 10 after layer 9, whatever is attached."""
    return {path: module for path, module in _ordered(model) if not isinstance(module, AdapterLayer)}


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear, embedding and expert layer of the bare model, by path.

    Order and contents are those of the bare model, so an adapter built over another starts like one built alone.
    """
    return {path: module for path, module in bare_modules(model).items() if isinstance(module, ADAPTABLE)}


def _ordered(model: nn.Module) -> list[tuple[str, nn.Module]]:
    def natural(item: tuple[str, nn.Module]) -> list[tuple[int, int, str]]:
        return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in item[0].split(".")]

    return sorted(_walk(model, ""), key=natural)


def _walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of all modules; a wrapper comes before its base, at the same path."""
    yield path, module
    if isinstance(module, AdapterLayer):
        yield from _walk(module.base, path)
        return
    for name, child in tree_flatten(module.children(), is_leaf=nn.Module.is_module):
        if isinstance(child, nn.Module):  # an empty list of modules is a leaf too
            yield from _walk(child, f"{path}.{name}" if path else name)


def find_targets(model: nn.Module, config: Adapter) -> list[str]:
    """Paths of the modules that `config.targets` and `config.layers` name, sorted by layer and name.

    Raises AdapterError when any target or layer index matches nothing, naming what exists.
    """
    prefixes = layer_prefixes(model)
    chosen = [prefixes[index] for index in layer_indices(config, len(prefixes))]
    base = {
        path: module for path, module in bare_modules(model).items() if isinstance(module, ADAPTABLE + CONVOLUTIONS)
    }
    inside = [path for path in base if path.startswith(tuple(chosen))]
    outside = [path for path in base if not path.startswith(tuple(prefixes))]
    targets = "attention" if config.targets == "own" else config.targets  # of the other method in a combination
    if targets == "attention":
        return _some(_attention(inside, prefixes), "attention projections", inside)
    if targets == "all-linear":
        others = EMBEDDINGS + CONVOLUTIONS
        linear = [path for path in inside if not isinstance(base[path], others) and not _is_router(path)]
        return _some(linear, "linear layers", inside)
    if isinstance(targets, str) and len(targets) > 1 and targets[0] == targets[-1] == "/":
        pattern = re.compile(targets[1:-1])
        return _some([path for path in inside + outside if pattern.search(path)], f"module for {targets}", inside)
    names = [targets] if isinstance(targets, str) else targets
    known = {path.rpartition(".")[2] for path in inside + outside}
    if missing := [name for name in names if not _named(inside + outside, name)]:
        raise AdapterError("; ".join(f"no module is called {name!r}{nearest(name, known)}" for name in missing))
    return [path for path in inside + outside if any(_named([path], name) for name in names)]


def _attention(paths: list[str], prefixes: list[str]) -> list[str]:
    """Projections inside attention blocks: a component below the layer says attention, none says router."""
    found = []
    for path in paths:
        relative = path.removeprefix(next(prefix for prefix in prefixes if path.startswith(prefix)))
        *blocks, _ = relative.split(".")
        if any(ATTENTION.search(block) for block in blocks) and not _is_router(relative):
            found.append(path)
    return found


def _is_router(path: str) -> bool:
    return bool(ROUTERS.intersection(path.split(".")))


def _named(paths: list[str], name: str) -> bool:
    return any(path == name or path.endswith(f".{name}") for path in paths)


def _some(found: list[str], what: str, candidates: list[str]) -> list[str]:
    if not found:
        names = sorted({path.rpartition(".")[2] for path in candidates})
        raise AdapterError(f"the model has no {what}", hint=f"its layers have: {', '.join(names)}")
    return found


def layer_indices(config: Adapter, count: int) -> list[int]:
    """The layers that `config.layers` names, in order. Raises AdapterError for one that the model doesn't have."""
    if config.layers == "all":
        return list(range(count))
    if isinstance(config.layers, int):
        if config.layers > count:
            raise AdapterError(f"adapter.layers is {config.layers}, the model has {count} layers")
        return list(range(count - config.layers, count))
    if wrong := [index for index in config.layers if not 0 <= index < count]:
        raise AdapterError(f"adapter.layers names {wrong}, the model's layers are 0 to {count - 1}")
    if not config.layers:
        raise AdapterError("adapter.layers is an empty list, nothing would train")
    return sorted(set(config.layers))


def layer_prefixes(model: nn.Module) -> list[str]:
    """Paths of the transformer blocks, each with its dot, in order; a network without any is one block, ""."""
    names = {id(module): path for path, module in bare_modules(model).items()}
    try:
        layers = [layer.base if isinstance(layer, AdapterLayer) else layer for layer in layers_of(model)]
    except ModelError:
        return [""]
    blocks = all(isinstance(layer, nn.Module) and layer.children() for layer in layers)
    return [f"{names[id(layer)]}." for layer in layers] if blocks else [""]
