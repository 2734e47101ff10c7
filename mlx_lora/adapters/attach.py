"""Put adapters on a model, take them off, exchange them: always whole, never touching the base's arrays.

`build` makes the wrappers for one adapter without changing the model; `put` installs a set of wrappers in place of
whatever adapter is there. Swapping is therefore a few hundred attribute assignments and no arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn

from mlx_lora import methods
from mlx_lora.adapters.base import AdapterLayer
from mlx_lora.adapters.placement import place, serving
from mlx_lora.adapters.targets import attached, bare_modules
from mlx_lora.config import Adapter
from mlx_lora.models.layers import set_modules

Wrappers = dict[str, AdapterLayer]


def attach(model: nn.Module, config: Adapter, *, seed: int = 0) -> Wrappers:
    """Wrap the targets of `config` in place and return the wrappers by module path.

    Whatever adapter was attached comes off first. Raises AdapterError when a target or a layer matches nothing, or
    when the method can't serve it.
    """
    wrappers = build(model, config, seed=seed)
    put(model, wrappers)
    return wrappers


def build(model: nn.Module, config: Adapter, *, seed: int = 0, only: Iterable[str] | None = None) -> Wrappers:
    """Wrappers around the base modules of `config`'s targets (or of the paths in `only`), leaving the model as it is.

    The initial A of a module depends on the seed and on the module's place among the targets. Ranks are checked
    against `targets` only: what another tool has trained may be wider than its layers.
    """
    bare = bare_modules(model)
    if only is None:
        placement = place(model, config)
        config, places = placement.config, placement.methods
    else:
        places = serving(model, config, list(only))
    keys = dict(zip(places, mx.random.split(mx.random.key(seed), max(len(places), 1)), strict=False))
    wrappers: Wrappers = {}
    for name in methods.parts(config.method):
        method, settings = methods.resolve(name), config.of(name)
        layers = {path: bare[path] for path, served_by in places.items() if served_by == name}
        shared = method.shared(layers, settings)
        for path, layer in layers.items():
            wrappers[path] = method.from_base(layer, settings, path=path, key=keys[path], shared=shared)
    return {path: wrappers[path] for path in places}


def put(model: nn.Module, wrappers: Wrappers) -> None:
    """Install `wrappers` (none: the bare base) in place of whatever is attached, wherever what they wrap is."""
    detach(model)
    for wrapper in wrappers.values():
        wrapper.train(model.training)
    bare = bare_modules(model)
    around = {id(bare[path]): wrapper for path, wrapper in wrappers.items() if path in bare}
    shared = {path: around[id(module)] for path, module in bare.items() if id(module) in around}
    _set(model, shared | wrappers, outer_first=False)  # a wrapper takes what it wraps as it is then


def detach(model: nn.Module) -> None:
    """Give every wrapped module's place back to the very module that is wrapped."""
    _set(model, {path: wrapper.base for path, wrapper in attached(model).items()}, outer_first=True)


def _set(model: nn.Module, modules: dict[str, nn.Module], *, outer_first: bool) -> None:
    """Put modules at paths, of which some may be inside others."""

    def depth(path: str) -> int:
        return path.count(".")

    for level in sorted({depth(path) for path in modules}, reverse=not outer_first):
        set_modules(model, {path: module for path, module in modules.items() if depth(path) == level})


__all__ = ["Wrappers", "attach", "attached", "build", "detach", "put"]
