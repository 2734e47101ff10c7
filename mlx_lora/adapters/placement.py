"""Where an adapter goes on a model, and with which rank: the settings of a recipe made true for every module.

A recipe names a group (attention, all-linear) or modules. Modules are meant as they are named: what can't be served, or
has no such rank, is an error. Of a group the method takes what it can serve. Small projections, such as the gates of a
state space, get the largest rank that they have and keep the scale of the others.

Everything that needs to know places, ranks or scales asks `place`: wrappers, plans, summaries and manifests. It looks
at shapes alone, so a model without weights will do.
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

    `reduced` are the ranks of the modules of a group that have no larger one, `left_out` the reasons of those that the
    method can't serve.
    """

    config: Adapter
    methods: dict[str, str] = field(default_factory=dict)
    reduced: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def place(model: nn.Module, config: Adapter) -> Placement:
    """The places of `config`'s targets on the bare model, whatever is attached to it.

    Raises AdapterError when a target or a layer matches nothing, when the method can't serve what was named, or nothing
    of a group, for a rank above the smaller dimension of a weight, and for a pattern of a rank that matches no module.
    """
    modules = bare_modules(model)
    _check_patterns(config, modules)
    places: dict[str, str] = {}
    reduced: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for name in methods.parts(config.method):
        method, settings = methods.resolve(name), config.of(name)
        own = method.find(model, settings)
        found = find_targets(model, settings) if own is None else own
        reasons = {path: reason for path in found if (reason := refusal(path, model, modules, settings))}
        is_group = own is None and group_of(settings) is not None
        if reasons and (not is_group or len(reasons) == len(found)):
            more = f" ({len(reasons)} such layers)" if len(reasons) > 1 else ""
            raise AdapterError(f"{name} can't be used here: {next(iter(reasons.values()))}{more}")
        layers = {path: modules[path] for path in found if path not in reasons}
        if name in methods.BOUNDED:
            reduced = _too_small(layers, settings) if is_group else {}
            config = config.with_ranks(reduced) if reduced else config
            check_ranks(config, layers)
        left_out |= reasons
        places |= dict.fromkeys(layers, name)
    return Placement(config, places, reduced, left_out)


def serving(model: nn.Module, config: Adapter, wanted: list[str]) -> dict[str, str]:
    """The method for each of the paths in `wanted`; those that none can serve are left out.

    Raises AdapterError for paths that the model doesn't have.
    """
    modules = bare_modules(model)
    if unknown := [path for path in wanted if path not in modules]:
        raise AdapterError(f"the model has no layer {', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}")
    places: dict[str, str] = {}
    for name in methods.parts(config.method):
        settings = config.of(name)
        places |= {path: name for path in wanted if refusal(path, model, modules, settings) is None}
    return {path: places[path] for path in wanted if path in places}


def refusal(path: str, model: nn.Module, modules: dict[str, nn.Module], config: Adapter) -> str | None:
    """Why the method of `config` can't serve the module at `path`, and what works instead, or None."""
    method: Any = methods.resolve(config.method)
    if reason := method.refusal(modules[path], config, path):
        return str(reason)
    return None if config.method == "full" else unwrappable(path, model, modules)  # a copy has a weight to be read


def _check_patterns(config: Adapter, modules: dict[str, nn.Module]) -> None:
    """Raise AdapterError where rank_pattern or alpha_pattern names nothing of the model: it would change no rank."""
    for setting in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, setting):
            named = Adapter(rank_pattern={pattern: 1})
            if pattern not in modules and not any(map(named.has_own_rank, modules)):
                known = {path.rpartition(".")[2] for path in modules if not path.endswith(tuple("0123456789"))}
                raise AdapterError(f"adapter.{setting}: no module is called {pattern!r}{nearest(pattern, known)}")


def _too_small(layers: dict[str, nn.Module], config: Adapter) -> dict[str, int]:
    """The largest rank of the layers that have less than the recipe's; none where it is too large for all of them.

    A rank that `rank_pattern` gives is meant for the modules it names.
    """
    largest = {path: smaller_dimension(layer) for path, layer in layers.items()}
    small = {path: most for path, most in largest.items() if most < config.rank_of(path)}
    if len(small) == len(layers):
        return {}
    return {path: most for path, most in small.items() if not config.has_own_rank(path)}
