"""A stored adapter held against a base: wrappers with its arrays, or every tensor that doesn't fit by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_lora.adapters.attach import Wrappers, build
from mlx_lora.adapters.base import AdapterLayer, layer_shape
from mlx_lora.adapters.targets import bare_modules
from mlx_lora.adapters.vera import VeRA
from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError
from mlx_lora.store.manifest import MLX_LM

if TYPE_CHECKING:
    from mlx_lora.store.adapter import StoredAdapter

# VeRA's pair, where an adapter's file holds it: A (r, largest in) and B (largest out, r) under these names.
PAIR = ("vera_A", "vera_B")


def wrappers_for(model: Any, adapter: StoredAdapter) -> Wrappers:
    """Frozen wrappers holding an adapter's arrays, ready to `put` on `model`, each with its own rank.

    Raises one AdapterError listing every tensor that is missing, extra, or of another shape.
    """
    known = bare_modules(model)
    pair = {name: adapter.arrays[name] for name in PAIR if name in adapter.arrays}
    modules = sorted(
        {name.rpartition(".")[0] for name in adapter.arrays.keys() - pair.keys()} | set(adapter.manifest.modules)
    )
    settings = Adapter.model_validate(adapter.manifest.adapter).model_copy(update={"dropout": 0.0, "init": "default"})
    wrappers = build(model, settings, only=[path for path in modules if path in known])
    unserved = [path for path in modules if path not in wrappers]
    faults = [f"{path} is no layer of the base that {settings.method} serves" for path in unserved]
    expected = set()
    one_rank = adapter.manifest.method in MLX_LM
    for path, wrapper in wrappers.items():
        if wrapper.rank:
            wrapper.scale = adapter.scale if one_rank else adapter.manifest.scales[path]
        for name in wrapper.adapter_params():
            expected.add(f"{path}.{name}")
            rank = adapter.rank if one_rank else wrapper.rank
            fault = _fill(wrapper, name, adapter.arrays.get(f"{path}.{name}"), rank)
            faults += [f"{path}.{name} {fault}"] if fault else []
    faults += _share(wrappers, pair)
    extra = [name for name in adapter.arrays.keys() - pair.keys() - expected if name.rpartition(".")[0] in known]
    faults += [f"{name} is not part of this method" for name in extra]
    if faults:
        raise AdapterError(f"{adapter.name} doesn't fit the base:\n  {listed(faults)}", hint="is this the right base?")
    for wrapper in wrappers.values():
        wrapper.freeze()
    return wrappers


def _share(wrappers: Wrappers, pair: dict[str, mx.array]) -> list[str]:
    """Give all VeRA wrappers the pair that came with the adapter, if one did; or say what is wrong with it."""
    if not pair:
        return []
    layers = [wrapper for wrapper in wrappers.values() if isinstance(wrapper, VeRA)]
    if not layers:
        return [f"{name} is not part of this method" for name in pair]
    shapes = [layer_shape(layer.base) for layer in layers]
    least = {
        "vera_A": (layers[0].rank, max(s[-1] for s in shapes)),
        "vera_B": (max(s[-2] for s in shapes), layers[0].rank),
    }
    faults = [f"{name} is missing" for name in PAIR if name not in pair]
    for name, array in pair.items():
        side = PAIR.index(name)  # where the rank is, which must be the same; the other side may be longer
        fits = (
            array.ndim == 2
            and array.shape[side] == least[name][side]
            and array.shape[1 - side] >= least[name][1 - side]
        )
        faults += [] if fits else [f"{name} has shape {tuple(array.shape)}, the base needs {least[name]}"]
    if not faults:
        a, b = (pair[name].astype(mx.float32) for name in PAIR)
        shared = mx.contiguous(a.T), b
        for layer in layers:
            layer._pair = shared
    return faults


def _fill(wrapper: AdapterLayer, name: str, stored: mx.array | None, rank: int) -> str | None:
    """Give a wrapper one stored array, cut from the file's rank to the wrapper's own; or say what is wrong with it."""
    shape = list(wrapper[name].shape)
    axis = rank_axis(name, len(shape)) if rank else None
    if axis is not None:
        shape[axis] = rank
    if stored is None:
        return "is missing"
    if list(stored.shape) != shape:
        return f"has shape {tuple(stored.shape)}, the base needs {tuple(shape)}"
    if axis is not None:
        stored = mx.split(stored, [min(wrapper.rank, rank)], axis=axis)[0]
    wrapper[name] = stored.astype(mx.float32)
    return None


def rank_axis(name: str, dimensions: int) -> int | None:
    """Where the rank is: lora_a (in, r) or (E, r, in), lora_b (r, out) or (E, out, r); nowhere in other arrays."""
    if name == "lora_a":
        return 1
    if name == "lora_b":
        return 2 if dimensions == 3 else 0
    return None


def listed(faults: list[str], *, most: int = 12) -> str:
    """Faults as lines of one message."""
    more = [f"… and {len(faults) - most} more"] if len(faults) > most else []
    return "\n  ".join(faults[:most] + more)
