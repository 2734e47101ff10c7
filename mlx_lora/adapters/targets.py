"""Find the modules of a model that an adapter is to wrap: by kind, by name, by regular expression, by layer.

Paths are those of the bare model, even while an adapter is attached.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora.adapters.base import ADAPTABLE, CONVOLUTIONS, EMBEDDINGS, AdapterLayer
from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError, ModelError, nearest
from mlx_lora.models.architectures import mixes_tokens, routes
from mlx_lora.models.trunk.layers import layers_of

# Targets that name a kind of module. A method leaves out those of a group that it can't wrap; for any other target, a
# module that it can't wrap is an error.
GROUPS = ("attention", "all-linear")


def attached(model: nn.Module) -> dict[str, AdapterLayer]:
    """The wrappers on `model`, by the path of the wrapped module in the bare model, in the model's order."""
    return {path: module for path, module in _sorted_modules(model) if isinstance(module, AdapterLayer)}


def bare_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the bare model by path, layer 10 after layer 9, without any attached wrappers."""
    return {path: module for path, module in _sorted_modules(model) if not isinstance(module, AdapterLayer)}


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear, embedding and expert layer of the bare model, by path.

    Order and contents are those of the bare model, so an adapter that is built while another one is attached has the
    same initial values.
    """
    return {path: module for path, module in bare_modules(model).items() if isinstance(module, ADAPTABLE)}


def _sorted_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
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


def group_of(config: Adapter) -> str | None:
    """The group that `config.targets` names, or None. "own" means attention for LoRA in lora+prefix and lora+prompt."""
    targets = "attention" if config.targets == "own" else config.targets
    return targets if isinstance(targets, str) and targets in GROUPS else None


def unique(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """`modules` with only the first path of each object: layers may share modules."""
    first: dict[int, str] = {}
    return {path: module for path, module in modules.items() if first.setdefault(id(module), path) == path}


def find_targets(model: nn.Module, config: Adapter) -> list[str]:
    """Paths of the modules that `config.targets` and `config.layers` name, sorted by layer and name.

    A module that several layers share is listed once. Raises AdapterError when any target or layer index matches
    nothing, naming what exists.
    """
    prefixes = layer_prefixes(model)
    chosen = [prefixes[index] for index in layer_indices(config, len(prefixes))]
    modules = bare_modules(model)
    base = {path: module for path, module in unique(modules).items() if isinstance(module, ADAPTABLE + CONVOLUTIONS)}
    inside = {path: prefix for path in base if (prefix := next(filter(path.startswith, chosen), None)) is not None}
    outside = [path for path in base if not path.startswith(tuple(prefixes))]
    targets = group_of(config) or config.targets
    if targets in GROUPS:
        not_linear = EMBEDDINGS + CONVOLUTIONS
        linear = {
            path: prefix
            for path, prefix in inside.items()
            if not isinstance(base[path], not_linear) and not routes(path, prefix, modules)
        }
        if targets == "all-linear":
            return _require(list(linear), "linear layers", inside, modules)
        mixers = [path for path, prefix in linear.items() if mixes_tokens(path, prefix, modules)]
        return _require(mixers, "attention projections", inside, modules)
    if isinstance(targets, str) and len(targets) > 1 and targets[0] == targets[-1] == "/":
        pattern = re.compile(targets[1:-1])
        matches = [path for path in [*inside, *outside] if pattern.search(path)]
        return _require(matches, f"module for {targets}", inside, modules)
    names = [targets] if isinstance(targets, str) else targets
    known = {path.rpartition(".")[2] for path in [*inside, *outside]}
    if missing := [name for name in names if not _any_called([*inside, *outside], name)]:
        raise AdapterError("; ".join(f"no module is called {name!r}{nearest(name, known)}" for name in missing))
    return [path for path in [*inside, *outside] if any(_any_called([path], name) for name in names)]


def _any_called(paths: list[str], name: str) -> bool:
    return any(path == name or path.endswith(f".{name}") for path in paths)


def _require(paths: list[str], what: str, candidates: Iterable[str], modules: dict[str, nn.Module]) -> list[str]:
    """`paths`, unless it is empty: then raises AdapterError that names the candidates, or the kinds of `modules`."""
    if paths:
        return paths
    names = sorted({path.rpartition(".")[2] for path in candidates})
    if names:
        raise AdapterError(f"the model has no {what}", hint=f"its layers have: {', '.join(names)}")
    kinds = {type(module).__name__ for module in modules.values() if "weight" in module and module["weight"].ndim > 1}
    raise AdapterError(
        f"the model has no {what}", hint=f"its weights are in {', '.join(sorted(kinds))}, not in linears"
    )


def layer_indices(config: Adapter, count: int) -> list[int]:
    """Indices of the layers in `config.layers`, in order. Raises AdapterError for one that the model doesn't have."""
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
    """Paths of the transformer blocks in order, each ending in a dot; [""] for a network without blocks."""
    names = {id(module): path for path, module in unique(bare_modules(model)).items()}
    try:
        layers = [layer.base if isinstance(layer, AdapterLayer) else layer for layer in layers_of(model)]
    except ModelError:
        return [""]
    blocks = all(isinstance(layer, nn.Module) and layer.children() for layer in layers)
    return [f"{names[id(layer)]}." for layer in layers] if blocks else [""]
