"""Attach an adapter to a model, detach it, or swap it for another. The base's arrays never change.

`build` makes the wrappers of one adapter without changing the model. `put` replaces the attached adapter, if any, by a
set of wrappers. Swapping adapters is therefore a few hundred attribute assignments and no arithmetic.
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

    An adapter that is already attached is detached first. Raises AdapterError when a target or a layer matches
    nothing, or when the method can't wrap a target.
    """
    wrappers = build(model, config, seed=seed)
    put(model, wrappers)
    return wrappers


def build(model: nn.Module, config: Adapter, *, seed: int = 0, only: Iterable[str] | None = None) -> Wrappers:
    """Make wrappers around the base modules of `config`'s targets (or the paths in `only`). The model doesn't change.

    A module's initial A depends on the seed and on the module's index among the targets. Ranks aren't checked for the
    paths in `only`: a stored adapter from another tool may have a rank above the dimensions of its layers.
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
        layers = {path: bare[path] for path, method_name in places.items() if method_name == name}
        shared = method.shared(layers, settings)
        for path, layer in layers.items():
            wrappers[path] = method.from_base(layer, settings, path=path, key=keys[path], shared=shared)
    return {path: wrappers[path] for path in places}


def put(model: nn.Module, wrappers: Wrappers) -> None:
    """Detach the attached adapter and install `wrappers`; an empty dict leaves the bare base.

    A module that several layers share has several paths: its wrapper is installed at all of them.
    """
    detach(model)
    for wrapper in wrappers.values():
        wrapper.train(model.training)
    bare = bare_modules(model)
    wrapper_of = {id(bare[path]): wrapper for path, wrapper in wrappers.items() if path in bare}
    everywhere = {path: wrapper_of[id(module)] for path, module in bare.items() if id(module) in wrapper_of}
    _set(model, everywhere | wrappers, outer_first=False)  # once a block is wrapped, paths inside it have changed


def detach(model: nn.Module) -> None:
    """Replace every wrapper by the very module that it wraps."""
    _set(model, {path: wrapper.base for path, wrapper in attached(model).items()}, outer_first=True)


def _set(model: nn.Module, modules: dict[str, nn.Module], *, outer_first: bool) -> None:
    """Put modules at paths; a path may be inside another one."""

    def depth(path: str) -> int:
        return path.count(".")

    for level in sorted({depth(path) for path in modules}, reverse=not outer_first):
        set_modules(model, {path: module for path, module in modules.items() if depth(path) == level})


__all__ = ["Wrappers", "attach", "attached", "build", "detach", "put"]
