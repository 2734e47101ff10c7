"""What a run should say about the places of its adapter: small ranks, modules left out, and what experts cost.

Modules are told by name, not by path: `in_proj_a, in_proj_b (6 modules)`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

import mlx.nn as nn

from mlx_lora.adapters.attach import Wrappers
from mlx_lora.adapters.base import EXPERTS, layer_shape
from mlx_lora.adapters.placement import Placement
from mlx_lora.adapters.targets import bare_modules, layer_prefixes
from mlx_lora.models.architectures import mixes_tokens


def notes(model: nn.Module, placement: Placement, wrappers: Wrappers) -> str:
    """What belongs behind the line that says what is about to happen: nothing, or each note after a semicolon."""
    found = []
    by_rank: dict[int, list[str]] = defaultdict(list)
    for path, rank in placement.reduced.items():
        by_rank[rank].append(path)
    for rank, paths in sorted(by_rank.items()):
        have = "has rank {}: it has" if len(paths) == 1 else "have rank {}: they have"
        found.append(f"{named(paths)} {have.format(rank)} no more")
    if placement.left_out:
        reason = next(iter(placement.left_out.values()))
        found.append(f"left out: {named(placement.left_out)}, because {reason}")
    if experts := _experts(model, wrappers):
        found.append(experts)
    return "".join(f"; {note}" for note in found)


def named(paths: Iterable[str]) -> str:
    """The names of modules and how many there are; a number in a list is no name, and what holds it is."""
    paths = list(paths)
    names = dict.fromkeys(next(part for part in reversed(path.split(".")) if not part.isdigit()) for path in paths)
    return f"{', '.join(sorted(names))} ({len(paths)} module{'s' if len(paths) > 1 else ''})"


def _experts(model: nn.Module, wrappers: Wrappers) -> str | None:
    """How much of an adapter is on stacks of experts: each expert has factors of its own."""
    prefixes, modules = layer_prefixes(model), bare_modules(model)
    layer = {path: next(filter(path.startswith, prefixes), "") for path in wrappers}
    stacks = {
        path: wrapper
        for path, wrapper in wrappers.items()
        if isinstance(wrapper.base, EXPERTS) and not mixes_tokens(path, layer[path], modules)  # attention may have one
    }
    if not stacks:
        return None
    layers = Counter(layer[path] for path in stacks)
    sizes = {layer_shape(wrapper.base)[0] for wrapper in stacks.values()}
    counts = sorted(set(layers.values()))
    stack = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    experts = f"{min(sizes)}" if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"
    return (
        f"experts: {stack} stacks of {experts} experts in each of {len(layers)} layers, "
        f"{_count(_parameters(stacks))} of {_count(_parameters(wrappers))} parameters"
    )


def _parameters(wrappers: Wrappers) -> int:
    return sum(array.size for wrapper in wrappers.values() for array in wrapper.adapter_arrays().values())


def _count(number: int) -> str:
    return f"{number / 1e6:,.0f} M" if number >= 10e6 else f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number:,}"
