"""Put adapters on a model, take them off, exchange them: always whole, never touching the base's arrays.

`build` makes the wrappers for one adapter without changing the model; `put` installs a set of wrappers in place of
whatever adapter is there. Swapping is therefore a few hundred attribute assignments and no arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn

from mlx_lora import methods
from mlx_lora.adapters.base import ADAPTABLE, EMBEDDINGS, AdapterLayer, check_ranks
from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError, nearest
from mlx_lora.models.load import set_modules
from mlx_lora.models.split import layers_of

Wrappers = dict[str, AdapterLayer]

# Linears that choose experts rather than transform activations.
ROUTERS = {"gate", "router", "shared_expert_gate", "indexer"}
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def attach(model: nn.Module, config: Adapter, *, seed: int = 0) -> Wrappers:
    """Wrap the targets of `config` in place and return the wrappers by module path.

    Whatever adapter was attached comes off first. Raises AdapterError when a target or a layer matches nothing.
    """
    wrappers = build(model, config, seed=seed)
    put(model, wrappers)
    return wrappers


def build(model: nn.Module, config: Adapter, *, seed: int = 0, only: Iterable[str] | None = None) -> Wrappers:
    """Wrappers around the base layers of `config`'s targets (or of the paths in `only`), leaving the model as it is.

    The initial A of a module depends on the seed and on the module's place among the targets. Ranks are checked
    against `targets` only: what another tool has trained may be wider than its layers.
    """
    base = adaptable(model)
    found = find_targets(model, config) if only is None else list(only)
    if unknown := [path for path in found if path not in base]:
        raise AdapterError(f"the model has no layer {', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}")
    if only is None:
        check_ranks(config, {path: base[path] for path in found})
    method = methods.resolve(config.method)
    keys = mx.random.split(mx.random.key(seed), len(found))
    return {
        path: method.from_base(base[path], config, path=path, key=key) for path, key in zip(found, keys, strict=True)
    }


def put(model: nn.Module, wrappers: Wrappers) -> None:
    """Install `wrappers` (none: the bare base) in place of whatever is attached."""
    detach(model)
    for wrapper in wrappers.values():
        wrapper.train(model.training)
    set_modules(model, dict(wrappers))


def detach(model: nn.Module) -> None:
    """Give every wrapped layer's place back to the very layer it wraps."""
    set_modules(model, {path: wrapper.base for path, wrapper in attached(model).items()})


def attached(model: nn.Module) -> Wrappers:
    """The wrappers on `model`, by module path, in the model's order."""
    return {path: module for path, module in _ordered_modules(model) if isinstance(module, AdapterLayer)}


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Every base layer that an adapter could wrap, by path, seen through whatever is attached.

    Order and contents are those of the bare model, so an adapter built over another starts like one built alone.
    """
    wrapped = attached(model)
    inside = tuple(f"{path}." for path in wrapped)
    return {
        path: wrapped[path].base if path in wrapped else module
        for path, module in _ordered_modules(model)
        if isinstance(module, (*ADAPTABLE, AdapterLayer)) and not path.startswith(inside)
    }


def find_targets(model: nn.Module, config: Adapter) -> list[str]:
    """Paths of the modules that `config.targets` and `config.layers` name, sorted by layer and name.

    Raises AdapterError when any target or layer index matches nothing, naming what exists.
    """
    prefixes = _layer_prefixes(model)
    chosen = [prefixes[index] for index in _layer_indices(config, len(prefixes))]
    base = adaptable(model)
    inside = [path for path in base if path.startswith(tuple(chosen))]
    outside = [path for path in base if not path.startswith(tuple(prefixes))]
    targets = config.targets
    if targets == "attention":
        return _some(_attention(inside, prefixes), "attention projections", inside)
    if targets == "all-linear":
        linear = [path for path in inside if not isinstance(base[path], EMBEDDINGS) and not _is_router(path)]
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


def _layer_indices(config: Adapter, count: int) -> list[int]:
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


def _layer_prefixes(model: nn.Module) -> list[str]:
    """Paths of the transformer blocks, each with its dot, in order."""
    names = {id(module): path for path, module in model.named_modules()}
    return [f"{names[id(layer)]}." for layer in layers_of(model)]


def _ordered_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules with paths, layer 10 after layer 9."""

    def natural(item: tuple[str, nn.Module]) -> list[tuple[int, int, str]]:
        return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in item[0].split(".")]

    return sorted(model.named_modules(), key=natural)
