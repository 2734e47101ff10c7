"""Prefix tuning (arXiv 2101.00190; LoRA's PreLayer, arXiv 2106.09685 §5.1): trained keys and values in every layer.

    attention(q, [P_k; K], [P_v; V])      P_k (kv heads, l, d), P_v (kv heads, l, d_v): l virtual tokens, seen by all

The LoRA paper describes it so: after every layer, the activations of l special tokens are replaced by trained ones.
Later tokens see only the keys and values of these activations, so keys and values are what trains here.

The wrapper replaces an attention module and gives it a proxy of its cache. The proxy puts the prefix in front of the
keys and values that the real cache returns. The real cache never holds the prefix, so positions, batches, trimming and
swapping adapters work as on the bare model. The prefix's keys are added after rotary embedding, so the attention that
they get depends on a token's position. Packing changes positions, so packed rows are refused.

At the start, the output isn't the base's: the prefix's values are zero, but its random keys take a share of the
attention from the real keys.
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

    In multi-head latent attention they are what its cache holds: latents, and rotary keys.
    """

    def __init__(self, layer: nn.Module, config: Adapter, key: Any):
        super().__init__()
        keys, values = _cache_shapes(layer)
        self.attention = layer
        # read now, because training replaces the module's class for a while
        self.__dict__["parameter_names"] = _parameters(layer)
        self.prefix_keys = mx.random.normal(_prefix_shape(keys, config), key=key)
        self.prefix_values = mx.zeros(_prefix_shape(values, config))

    @staticmethod
    def find(model: nn.Module, config: Adapter) -> list[str]:
        """The attention module of each layer of `config.layers`; layers without cached keys and values are left out."""
        bare, prefixes = bare_modules(model), layer_prefixes(model)
        paths: list[str] = []
        for index in layer_indices(config, len(prefixes)):
            inside = [path for path in bare if path.startswith(prefixes[index])]
            attention = (path for path in inside if ATTENTION.search(path.rpartition(".")[2]))
            paths += [path for path in attention if not _fault(bare[path])][:1]  # the outermost
        if not paths:
            raise AdapterError(
                "no chosen layer has attention that keeps keys and values, which a prefix goes in front of",
                hint="methods lora and prompt work on every layer",
            )
        return paths

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

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        call = dict(zip(self.parameter_names, arguments, strict=False)) | keywords
        if isinstance(call.get("cache"), PackedCache):
            raise AdapterError("prefix can't use packed rows: packing changes each row's distance to the prefix")
        cache = _CacheWithPrefix(call.get("cache"), self.prefix_keys, self.prefix_values)
        mask = "mask" if "mask" in self.parameter_names else "attention_mask"
        call |= {"cache": cache, mask: _widen_mask(call.get(mask), self.prefix_keys.shape[1])}
        return cache.without_prefix(self.attention(**call))

    def __getattr__(self, name: str) -> Any:
        """Any other attribute is the wrapped module's: some models read settings from their attention modules."""
        if name in self or "attention" not in self:
            return super().__getattr__(name)
        return getattr(self["attention"], name)

    def delta(self) -> mx.array:
        raise CannotFuse(NO_UPDATE, hint="keep it as an adapter")

    def fuse(self) -> nn.Module:
        raise CannotFuse(NO_UPDATE, hint="keep it as an adapter")

    def _extra_repr(self) -> str:
        return f"virtual_tokens={self.prefix_keys.shape[1]}"


class _CacheWithPrefix:
    """The cache that a wrapped attention module sees: the real one, if any, with a prefix before keys and values."""

    def __init__(self, cache: Any, keys: mx.array, values: mx.array):
        self._cache, self._prefix = cache, (keys, values)
        self._returned: list[tuple[mx.array, mx.array]] = []  # (with the prefix, without it)

    @property
    def offset(self) -> Any:
        return 0 if self._cache is None else self._cache.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if hasattr(self._cache, "bits"):
            raise AdapterError("a prefix can't join a quantized cache", hint="generate without kv_bits")
        if self._cache is not None:
            keys, values = self._cache.update_and_fetch(keys, values)
        bare = (keys, values)
        joined = [_prepend(prefix, array) for prefix, array in zip(self._prefix, bare, strict=True)]
        self._returned = list(zip(joined, bare, strict=True))
        return joined[0], joined[1]

    def without_prefix(self, output: Any) -> Any:
        """An attention module's output with the prefix removed from keys and values in it.

        Some models return keys and values for other layers to share.
        """
        if isinstance(output, tuple):
            return tuple(self.without_prefix(part) for part in output)
        return next((bare for joined, bare in self._returned if output is joined), output)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _prepend(prefix: mx.array, array: mx.array) -> mx.array:
    """(kv heads, l, d) and (B, kv heads, T, d) -> (B, kv heads, l + T, d), in the array's dtype."""
    repeated = mx.broadcast_to(prefix.astype(array.dtype), (array.shape[0], *prefix.shape))
    return mx.concatenate([repeated, array], axis=2)


def _widen_mask(mask: Any, count: int) -> Any:
    """Add `count` visible columns before a mask array (…, T, keys). "causal" is aligned at the end, so it stays."""
    if not isinstance(mask, mx.array):
        return mask
    visible = (mx.ones if mask.dtype == mx.bool_ else mx.zeros)((*mask.shape[:-1], count), mask.dtype)
    return mx.concatenate([visible, mask], axis=-1)


def _parameters(layer: nn.Module) -> dict[str, bool]:
    """Names of the parameters of a module's __call__, in order, and whether each has a default."""
    parameters = list(inspect.signature(type(layer).__call__).parameters.values())[1:]
    return {parameter.name: parameter.default is not inspect.Parameter.empty for parameter in parameters}


def _prefix_shape(shape: Shape, config: Adapter) -> Shape:
    """The shape of a prefix, (kv heads, l, d), given that of one token's keys or values, (1, kv heads, 1, d)."""
    return (shape[1], config.virtual_tokens, shape[3])


def _fault(layer: nn.Module) -> str | None:
    """Why a module can't have a prefix, or None."""
    try:
        _cache_shapes(layer)
    except Exception as error:  # a module that isn't attention may raise anything when it is called like one
        return str(error) if isinstance(error, AdapterError) else "it isn't attention that caches keys and values"
    return None


def _cache_shapes(layer: nn.Module) -> tuple[Shape, Shape]:
    """Shapes (1, kv heads, 1, d) of the keys and values that attention caches for one token; nothing is computed.

    Raises AdapterError if it caches none of its own. A module that isn't attention may raise anything.
    """
    first, *rest = _parameters(layer)
    if "cache" not in rest or not {"mask", "attention_mask"}.intersection(rest):
        raise AdapterError("it isn't called with a mask and a cache")
    linears = [module for module in layer.modules() if isinstance(module, LINEARS)]
    # most linears take hidden states, so the most common width is tried first
    widths = Counter(layer_shape(linear)[-1] for linear in linears)
    required = [name for name, optional in _parameters(layer).items() if not optional and name not in (first, "cache")]
    fault: Exception = AdapterError("it has no linear layers")
    for width, _ in widths.most_common():
        cache = RecordingCache()
        more = {name: None if "mask" in name else mx.ones((1,)) for name in required}
        try:
            layer(**{first: mx.zeros((1, 1, width)), **more, "cache": cache})
        except Exception as error:  # this isn't the width of the hidden states
            fault = error
            continue
        if len(cache.recorded) == 1 and all(array.ndim == 4 for array in cache.recorded[0]):
            keys, values = cache.recorded[0]
            return keys.shape, values.shape
        fault = AdapterError("it keeps no keys and values of its own")
    raise fault
