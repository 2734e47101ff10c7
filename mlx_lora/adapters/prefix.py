"""Prefix tuning (arXiv 2101.00190; LoRA's PreLayer, arXiv 2106.09685 §5.1): trained keys and values in every layer.

    attention(q, [P_k; K], [P_v; V])      P_k (kv heads, l, d), P_v (kv heads, l, d_v): l virtual tokens, seen by all

In LoRA's words the activations of l special tokens are replaced by trained ones after every layer; what a later token
sees of them are their keys and values, and those are what trains. The wrapper stands in for an attention module and
hands it a stand-in for its cache, which puts the prefix in front of whatever keys and values the real cache gives. The
real cache never holds the prefix: positions, batches, trimming and swaps are those of the bare model. The keys are as
they are after rotary embedding, so what a token sees of them depends on its position: packed rows would see others.

The start isn't the base's output: values are zero, but attention gives the random keys a share, which real ones lack.
"""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.base import LINEARS, AdapterLayer, layer_shape
from mlx_lora.adapters.targets import bare_modules, layer_indices, layer_prefixes
from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError, CannotFuse
from mlx_lora.models.architectures import ATTENTION
from mlx_lora.models.trunk.segments import PackedCache
from mlx_lora.models.trunk.standins import RecordingCache

NO_UPDATE = "a prefix of keys and values is no update of a weight"
Shape = tuple[int, ...]


class Prefix(AdapterLayer):
    """prefix_keys (kv heads, l, d) and prefix_values (kv heads, l, d_v), float32, in front of an attention module's.

    Under multi-head latent attention they are what its cache keeps: latents, and rotary keys.
    """

    def __init__(self, layer: nn.Module, config: Adapter, key: Any):
        super().__init__()
        keys, values = _kept(layer)
        self.attention = layer
        self.__dict__["named"] = _parameters(layer)  # by the module's own class: training gives it another for a while
        self.prefix_keys = mx.random.normal(_before(keys, config), key=key)
        self.prefix_values = mx.zeros(_before(values, config))

    @staticmethod
    def find(model: nn.Module, config: Adapter) -> list[str]:
        """The attention module of each layer of `config.layers` that keeps keys and values; others are left out."""
        bare, prefixes = bare_modules(model), layer_prefixes(model)
        found = []
        for index in layer_indices(config, len(prefixes)):
            inside = [path for path in bare if path.startswith(prefixes[index])]
            named = (path for path in inside if ATTENTION.search(path.rpartition(".")[2]))
            found += [path for path in named if not _fault(bare[path])][:1]  # the outermost
        if not found:
            raise AdapterError(
                "no chosen layer has attention that keeps keys and values, which a prefix goes in front of",
                hint="methods lora and prompt work on every layer",
            )
        return found

    @staticmethod
    def refusal(layer: nn.Module, config: Adapter, path: str) -> str | None:
        fault = _fault(layer)
        return f"{path} can't have a prefix: {fault}; methods lora and prompt work there" if fault else None

    @staticmethod
    def from_base(layer: nn.Module, config: Adapter, *, path: str, key: Any, shared: Any = None) -> Prefix:
        """Wrap an attention module of mlx-lm's. `key` seeds the prefix's keys."""
        return Prefix(layer, config, key)

    @property
    def base(self) -> nn.Module:
        return self["attention"]  # type: ignore[no-any-return]

    def adapter_params(self) -> tuple[str, ...]:
        return ("prefix_keys", "prefix_values")

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        call = dict(zip(self.named, arguments, strict=False)) | named
        if isinstance(call.get("cache"), PackedCache):
            raise AdapterError("a prefix is at a distance from each row that packing would change")
        cache = _Front(call.get("cache"), self.prefix_keys, self.prefix_values)
        mask = "mask" if "mask" in self.named else "attention_mask"
        call |= {"cache": cache, mask: _widened(call.get(mask), self.prefix_keys.shape[1])}
        return cache.without_prefix(self.attention(**call))

    def __getattr__(self, name: str) -> Any:
        """Some models ask their attention modules for settings."""
        if name in self or "attention" not in self:
            return super().__getattr__(name)
        return getattr(self["attention"], name)

    def delta(self) -> mx.array:
        raise CannotFuse(NO_UPDATE, hint="keep it as an adapter")

    def fuse(self) -> nn.Module:
        raise CannotFuse(NO_UPDATE, hint="keep it as an adapter")

    def _extra_repr(self) -> str:
        return f"virtual_tokens={self.prefix_keys.shape[1]}"


class _Front:
    """The cache that a wrapped attention module sees: the real one, if any, with a prefix in front of what it gives."""

    def __init__(self, cache: Any, keys: mx.array, values: mx.array):
        self._cache, self._prefix = cache, (keys, values)
        self._given: list[tuple[mx.array, mx.array]] = []

    @property
    def offset(self) -> Any:
        return 0 if self._cache is None else self._cache.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if hasattr(self._cache, "bits"):
            raise AdapterError("a prefix can't join a quantized cache", hint="generate without kv_bits")
        if self._cache is not None:
            keys, values = self._cache.update_and_fetch(keys, values)
        bare = (keys, values)
        joined = [_in_front(prefix, array) for prefix, array in zip(self._prefix, bare, strict=True)]
        self._given = list(zip(joined, bare, strict=True))
        return joined[0], joined[1]

    def without_prefix(self, output: Any) -> Any:
        """An attention module's output; keys and values in it, which other layers share, as the real cache has them."""
        if isinstance(output, tuple):
            return tuple(self.without_prefix(part) for part in output)
        return next((bare for joined, bare in self._given if output is joined), output)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _in_front(prefix: mx.array, array: mx.array) -> mx.array:
    """(kv heads, l, d) and (B, kv heads, T, d) -> (B, kv heads, l + T, d), in the array's dtype."""
    repeated = mx.broadcast_to(prefix.astype(array.dtype), (array.shape[0], *prefix.shape))
    return mx.concatenate([repeated, array], axis=2)


def _widened(mask: Any, count: int) -> Any:
    """A mask array (…, T, keys) with `count` visible columns in front; "causal" counts from the end and stays."""
    if not isinstance(mask, mx.array):
        return mask
    visible = (mx.ones if mask.dtype == mx.bool_ else mx.zeros)((*mask.shape[:-1], count), mask.dtype)
    return mx.concatenate([visible, mask], axis=-1)


def _parameters(layer: nn.Module) -> dict[str, bool]:
    """Names of what a module is called with, in order, and whether each has a default."""
    parameters = list(inspect.signature(type(layer).__call__).parameters.values())[1:]
    return {parameter.name: parameter.default is not inspect.Parameter.empty for parameter in parameters}


def _before(shape: Shape, config: Adapter) -> Shape:
    """The shape of the prefix of what has `shape` (1, kv heads, 1, d)."""
    return (shape[1], config.virtual_tokens, shape[3])


def _fault(layer: nn.Module) -> str | None:
    """Why a module can't have a prefix, or None."""
    try:
        _kept(layer)
    except Exception as error:  # whatever a module that isn't attention makes of a call as if it were
        return str(error) if isinstance(error, AdapterError) else "it is no attention that keeps keys and values"
    return None


def _kept(layer: nn.Module) -> tuple[Shape, Shape]:
    """Shapes (1, kv heads, 1, d) of the keys and values that attention keeps of one token; nothing is computed.

    Raises AdapterError where it keeps none of its own, and whatever the module raises that is no attention.
    """
    first, *others = _parameters(layer)
    if "cache" not in others or not {"mask", "attention_mask"}.intersection(others):
        raise AdapterError("it isn't called with a mask and a cache")
    linears = [module for module in layer.modules() if isinstance(module, LINEARS)]
    widths = Counter(layer_shape(linear)[-1] for linear in linears)  # the hidden states' width is that of most
    needed = [name for name, optional in _parameters(layer).items() if not optional and name not in (first, "cache")]
    fault: Exception = AdapterError("it has no linear layers")
    for width, _ in widths.most_common():
        cache = RecordingCache()
        scales = {name: None if "mask" in name else mx.ones((1,)) for name in needed}
        try:
            layer(**{first: mx.zeros((1, 1, width)), **scales, "cache": cache})
        except Exception as error:  # the width of something else
            fault = error
            continue
        if len(cache.noted) == 1 and all(array.ndim == 4 for array in cache.noted[0]):
            keys, values = cache.noted[0]
            return keys.shape, values.shape
        fault = AdapterError("it keeps no keys and values of its own")
    raise fault
