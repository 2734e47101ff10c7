"""Which modules of a model an adapter wraps, and with which method, rank and scale.

A recipe names either a group (attention, all-linear) or single modules. For single modules, one that the method can't
wrap or that is too small for the rank is an error. From a group, the modules that the method can't wrap are left out.
A group's projections that are too small for the rank, such as the gates of a state space, get the largest rank that
they can have, at the same scale as the others.

Wrappers, plans, summaries and manifests all get paths, ranks and scales from `place`. It reads only shapes, so it works
on a model without weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.nn as nn

from mlx_lora import methods
from mlx_lora.adapters.base import check_ranks, smaller_dimension
from mlx_lora.adapters.targets import bare_modules, find_targets, group_of
from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError, nearest
from mlx_lora.models.architectures import unwrappable


@dataclass(frozen=True)
class Placement:
    """`config` holds every module's own rank and alpha; `methods` is the method of each module by path, in order.

    `reduced` has the rank of each module that is too small for the recipe's rank. `left_out` has the reason for each
    module of a group that the method can't wrap.
    """

    config: Adapter
    methods: dict[str, str] = field(default_factory=dict)
    reduced: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def place(model: nn.Module, config: Adapter) -> Placement:
    """Find `config`'s targets on the bare model; an attached adapter makes no difference.

    Raises AdapterError if a target or a layer matches nothing, if the method can't wrap a module that was named or any
    module of a group, if a rank is above the smaller dimension of a weight, or if a rank or alpha pattern matches no
    module.
    """
    modules = bare_modules(model)
    _check_patterns(config, modules)
    places: dict[str, str] = {}
    reduced: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for name in methods.parts(config.method):
        method, settings = methods.resolve(name), config.of(name)
        chosen_by_method = method.find(model, settings)
        paths = find_targets(model, settings) if chosen_by_method is None else chosen_by_method
        reasons = {path: reason for path in paths if (reason := refusal(path, model, modules, settings))}
        is_group = chosen_by_method is None and group_of(settings) is not None
        if reasons and (not is_group or len(reasons) == len(paths)):
            more = f" ({len(reasons)} such layers)" if len(reasons) > 1 else ""
            raise AdapterError(f"{name} can't be used here: {next(iter(reasons.values()))}{more}")
        layers = {path: modules[path] for path in paths if path not in reasons}
        if name in methods.BOUNDED:
            reduced = _reduced_ranks(layers, settings) if is_group else {}
            config = config.with_ranks(reduced) if reduced else config
            check_ranks(config, layers)
        left_out |= reasons
        places |= dict.fromkeys(layers, name)
    return Placement(config, places, reduced, left_out)


def serving(model: nn.Module, config: Adapter, paths: list[str]) -> dict[str, str]:
    """The method of `config` that can wrap each of `paths`, by path; paths that no method can wrap are left out.

    Raises AdapterError for paths that the model doesn't have.
    """
    modules = bare_modules(model)
    if unknown := [path for path in paths if path not in modules]:
        raise AdapterError(f"the model has no layer {', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}")
    places: dict[str, str] = {}
    for name in methods.parts(config.method):
        settings = config.of(name)
        places |= {path: name for path in paths if refusal(path, model, modules, settings) is None}
    return {path: places[path] for path in paths if path in places}


def refusal(path: str, model: nn.Module, modules: dict[str, nn.Module], config: Adapter) -> str | None:
    """Why the method of `config` can't wrap the module at `path` and what works instead, or None."""
    method: Any = methods.resolve(config.method)
    if reason := method.refusal(modules[path], config, path):
        return str(reason)
    if config.method == "full":  # its wrapper has a weight of its own, for a model that reads the weight
        return None
    return unwrappable(path, model, modules)


def _check_patterns(config: Adapter, modules: dict[str, nn.Module]) -> None:
    """Raise AdapterError if a key of rank_pattern or alpha_pattern matches no module: it would have no effect."""
    for setting in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, setting):
            only_this = Adapter(rank_pattern={pattern: 1})
            if pattern not in modules and not any(map(only_this.has_own_rank, modules)):
                known = {path.rpartition(".")[2] for path in modules if not path.endswith(tuple("0123456789"))}
                raise AdapterError(f"adapter.{setting}: no module is called {pattern!r}{nearest(pattern, known)}")


def _reduced_ranks(layers: dict[str, nn.Module], config: Adapter) -> dict[str, int]:
    """The largest possible rank of each layer that is too small for the recipe's rank; empty if all are too small.

    Ranks from `rank_pattern` aren't reduced, since they are set for exactly the modules that it names.
    """
    largest = {path: smaller_dimension(layer) for path, layer in layers.items()}
    small = {path: most for path, most in largest.items() if most < config.rank_of(path)}
    if len(small) == len(layers):
        return {}
    return {path: most for path, most in small.items() if not config.has_own_rank(path)}
