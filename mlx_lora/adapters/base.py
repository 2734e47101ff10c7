"""The contract of a method's wrapper, and what every method needs of a layer: its kind, its shape, its largest rank.

A wrapper is a module that replaces one frozen base module, which it holds, and adds a few trainable arrays:

    find(model, config) -> paths                 the modules to wrap, or None: adapter.targets names them
    refusal(layer, config, path) -> reason       why the method can't wrap a layer and what works instead, or None
    shared(layers, config) -> anything           what all wrappers share, made once, such as VeRA's frozen matrices
    from_base(layer, config, path=…, key=…, shared=…) -> module     the wrapper around `layer`
    __call__(x)                                  base output with the update
    base -> layer                                the wrapped module, the same object that from_base got
    adapter_params() -> names                    names of the trainable arrays
    delta() -> array                             the update of the weight; raises CannotFuse if there is none
    fuse() -> layer                              a plain layer with the update merged; raises CannotFuse
    fuse_packed() -> layer                       a packed layer with the update merged exactly, or None
    stored_arrays() -> arrays                    the arrays that the adapter's file holds

Adapter parameters are float32 masters; they are cast to the activations' dtype where they are used, so that a
half-precision model stays in half precision.
"""

from __future__ import annotations

from abc import abstractmethod
from math import prod
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError
from mlx_lora.models import QuantizedSwitchLinear, SwitchLinear
from mlx_lora.models.layers import plain_layer
from mlx_lora.quant.nf4 import NF4SwitchLinear
from mlx_lora.quant.quantize import dequantize_layer

LINEARS = (nn.Linear, nn.QuantizedLinear)
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)
EXPERTS = (SwitchLinear, QuantizedSwitchLinear, NF4SwitchLinear)
ADAPTABLE = LINEARS + EMBEDDINGS + EXPERTS
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
# The part of the contract that has no default.
REQUIRED = ("from_base", "__call__", "base", "adapter_params", "delta")


class AdapterLayer(nn.Module):
    """Base of every method's wrapper. `scale` is s in y = W₀x + s·Δx, `rank` is 0 where the method has none.

    PRECISE names the arrays that are stored in float32, such as vectors that multiply a whole row. Low-rank factors are
    stored in bf16.

    `class LoRA(AdapterLayer, abstract=True)` declares the common base of a method's classes. Any other subclass that
    lacks a part of the contract raises TypeError when it is defined. `@abstractmethod` alone would have no effect,
    because nn.Module's metaclass isn't ABCMeta.
    """

    PRECISE: ClassVar[frozenset[str]] = frozenset()

    scale: float = 1.0
    rank: int = 0

    def __init_subclass__(cls, *, abstract: bool = False, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        members: dict[str, Any] = {}  # not getattr: it finds a __call__ on every class, the one that makes objects
        for parent in reversed(cls.__mro__):
            members |= vars(parent)
        lacking = {name for name, member in members.items() if getattr(member, "__isabstractmethod__", False)}
        lacking |= set(REQUIRED) - members.keys()
        if lacking and not abstract:
            raise TypeError(f"{cls.__name__} lacks {', '.join(sorted(lacking))} of the contract in adapters/base.py")

    @staticmethod
    def find(model: nn.Module, config: Adapter) -> list[str] | None:
        """Paths of the modules to wrap, if the method chooses them; None if `adapter.targets` does."""
        return None

    @staticmethod
    def refusal(layer: nn.Module, config: Adapter, path: str) -> str | None:
        """Why the method can't wrap `layer` and what works instead, or None."""
        if isinstance(layer, ADAPTABLE):
            return None
        return f"a {type(layer).__name__} can't be served by {config.method}; a linear layer or an embedding can"

    @staticmethod
    def shared(layers: dict[str, nn.Module], config: Adapter) -> Any:
        """What the wrappers of all `layers` share; passed to `from_base`."""
        return None

    @property
    @abstractmethod
    def base(self) -> nn.Module:
        """The wrapped module, the same object that `from_base` got."""

    @abstractmethod
    def adapter_params(self) -> tuple[str, ...]:
        """Names of the trainable arrays of this wrapper."""

    @abstractmethod
    def delta(self) -> mx.array:
        """The update of the weight, float32, in the weight's own (unpacked) shape. Raises CannotFuse without one."""

    def fuse(self) -> nn.Module:
        """A plain layer with weight W₀ + ΔW in float32, whether the base is packed or not."""
        return plain_layer(self.base, dequantize_layer(self.base, mx.float32) + self.delta())

    def fuse_packed(self) -> nn.Module | None:
        """The packed base with the update merged exactly, without requantizing; None where that isn't possible."""
        return None

    def adapter_arrays(self) -> dict[str, mx.array]:
        """The trainable arrays by name."""
        return {name: self[name] for name in self.adapter_params()}

    def stored_arrays(self) -> dict[str, mx.array]:
        """The arrays to store, by name. Loading puts them into a wrapper that `from_base` made."""
        return self.adapter_arrays()


def by_kind(layer: nn.Module, linear: Any, embedding: Any, experts: Any) -> Any:
    """The class for the kind of `layer`, out of a method's three."""
    if isinstance(layer, EMBEDDINGS):
        return embedding
    return experts if isinstance(layer, EXPERTS) else linear


def layer_shape(layer: nn.Module) -> tuple[int, ...]:
    """The unpacked shape of a layer's weight: (out, in), (vocabulary, dim) or (experts, out, in)."""
    *leading, columns = layer["weight"].shape
    if "scales" in layer:
        columns = columns * 32 // layer.bits  # this order: 32 // bits is wrong for 3, 5 and 6 bits
    return (*leading, columns)


def check_ranks(config: Adapter, layers: dict[str, nn.Module]) -> None:
    """Raise AdapterError naming every layer whose smaller dimension is below its rank."""
    smaller = {path: smaller_dimension(layer) for path, layer in layers.items()}
    faults = [path for path, dimension in smaller.items() if config.rank_of(path) > dimension]
    if faults:
        most = min(smaller[path] for path in faults)
        shown = ", ".join(f"{config.rank_of(path)} for {path} ({smaller[path]})" for path in faults[:5])
        raise AdapterError(
            f"the rank is above the smaller dimension of the weight: {shown}{' …' if len(faults) > 5 else ''}",
            hint=f"choose adapter.rank of at most {most}, or set adapter.rank_pattern for these modules",
        )


def smaller_dimension(layer: nn.Module) -> int:
    """The smaller dimension of the weight as a matrix; a convolution's matrix is (out, patch)."""
    if isinstance(layer, CONVOLUTIONS):
        outputs, *patch = layer["weight"].shape
        return min(outputs, prod(patch))
    return min(layer_shape(layer)[-2:])


def draw(config: Adapter, shape: tuple[int, ...], *, fan_in: int, rank: int, key: Any) -> mx.array:
    """Draw factor A: uniform ±1/√fan_in (Kaiming with a = √5), or Gaussian with standard deviation 1/r; float32."""
    if config.init == "gaussian":
        return mx.random.normal(shape, scale=1 / rank, key=key)
    bound = fan_in**-0.5
    return mx.random.uniform(-bound, bound, shape, key=key)
