"""Put adapters on a model, take them off, exchange them: always whole, never touching the base's arrays.

`build` makes the wrappers for one adapter without changing the model; `put` installs a set of wrappers in place of
whatever adapter is there. Swapping is therefore a few hundred attribute assignments and no arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora import methods
from mlx_lora.adapters.base import AdapterLayer, check_ranks
from mlx_lora.adapters.targets import attached, bare_modules, find_targets
from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError
from mlx_lora.models.load import set_modules

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
    against `targets` only: what another tool has trained may be wider than its layers. Of a combination of methods
    each wraps its own modules, and a path that two of them want is an error.
    """
    bare = bare_modules(model)
    wanted = None if only is None else list(only)
    if unknown := [path for path in wanted or [] if path not in bare]:
        raise AdapterError(f"the model has no layer {', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}")
    places: dict[str, str] = {}
    for name in methods.parts(config.method):
        places |= dict.fromkeys(_places(model, config.of(name), bare, wanted), name)
    if wanted is not None:
        places = {path: places[path] for path in wanted if path in places}
    keys = dict(zip(places, mx.random.split(mx.random.key(seed), max(len(places), 1)), strict=False))
    wrappers: Wrappers = {}
    for name in methods.parts(config.method):
        layers = {path: bare[path] for path, method in places.items() if method == name}
        wrappers |= _wrapped(methods.resolve(name), layers, config.of(name), keys, check=wanted is None)
    return {path: wrappers[path] for path in places}


def _places(model: nn.Module, config: Adapter, bare: dict[str, nn.Module], wanted: list[str] | None) -> list[str]:
    """Where one method goes: its own places, those of `config.targets`, or those of `wanted` that it can serve."""
    method = methods.resolve(config.method)
    if wanted is None:
        return method.find(model, config) or find_targets(model, config)  # type: ignore[no-any-return]
    return [path for path in wanted if method.refusal(bare[path], config, path) is None]


def _wrapped(
    method: Any, layers: dict[str, nn.Module], config: Adapter, keys: dict[str, mx.array], *, check: bool
) -> Wrappers:
    faults = [reason for path, layer in layers.items() if (reason := method.refusal(layer, config, path))]
    if faults:
        more = f" ({len(faults)} such layers)" if len(faults) > 1 else ""
        raise AdapterError(f"{config.method} can't be used here: {faults[0]}{more}")
    if check and config.method in methods.BOUNDED:
        check_ranks(config, layers)
    shared = method.shared(layers, config)
    return {
        path: method.from_base(layer, config, path=path, key=keys[path], shared=shared)
        for path, layer in layers.items()
    }


def put(model: nn.Module, wrappers: Wrappers) -> None:
    """Install `wrappers` (none: the bare base) in place of whatever is attached."""
    detach(model)
    for wrapper in wrappers.values():
        wrapper.train(model.training)
    _set(model, dict(wrappers), outer_first=False)  # a wrapper takes what it wraps as it is then


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
