"""Full fine-tuning: every parameter of a module trains, which is the baseline of all methods (2106.09685 §5.1).

    the module itself, computing with trained copies of its parameters

The copies are float32. The module computes with them cast to the dtype of the base's parameters, so the start is
bit-identical and a half-precision model stays in half precision. Copies of float32 parameters share the base's memory
until training changes them. Any module without modules inside can be wrapped: linears, embeddings, experts, norms,
convolutions. Parameters that a block holds beside its modules (attention sinks, for example) don't train; neither do
running statistics.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.base import AdapterLayer
from mlx_lora.adapters.targets import bare_modules, layer_indices, layer_prefixes
from mlx_lora.config import Adapter
from mlx_lora.errors import CannotFuse
from mlx_lora.quant.matmul import like

STATISTICS = {"running_mean", "running_var"}


class Full(AdapterLayer):
    """A float32 copy of each of the module's parameters, under the parameter's own name."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        for name in own_parameters(layer):
            self[name] = layer[name].astype(mx.float32)
        # stored in float32: bf16 would round the base's values, not only the update
        self.__dict__["PRECISE"] = frozenset(own_parameters(layer))

    @staticmethod
    def from_base(layer: nn.Module, config: Adapter, *, path: str, key: Any, shared: Any = None) -> Full:
        """Wrap any module for which `refusal` returns None. Nothing here is random."""
        return Full(layer)

    @staticmethod
    def find(model: nn.Module, config: Adapter) -> list[str] | None:
        """For targets `all`: modules with parameters in the chosen layers, and outside the layers if all are chosen."""
        if config.targets != "all":
            return None
        prefixes = layer_prefixes(model)
        chosen = tuple(prefixes[index] for index in layer_indices(config, len(prefixes)))
        return [
            path
            for path, module in bare_modules(model).items()
            if not module.children()
            and _own_arrays(module)  # packed ones too, so that `refusal` names them
            and (path.startswith(chosen) or (config.layers == "all" and not path.startswith(tuple(prefixes))))
        ]

    @staticmethod
    def refusal(layer: nn.Module, config: Adapter, path: str) -> str | None:
        if "scales" in layer or any(not _is_float(array) for _, array in _own_arrays(layer)):
            return f"{path} is packed and can't train; a half-precision base can, or method lora over this one"
        if layer.children() or not own_parameters(layer):
            return f"{path}, a {type(layer).__name__}, has no parameters of its own; the modules inside it may have"
        return None

    @property
    def base(self) -> nn.Module:
        return self["layer"]

    def adapter_params(self) -> tuple[str, ...]:
        return own_parameters(self.base)

    def __call__(self, *arguments: Any, **settings: Any) -> mx.array:
        return self._trained_module()(*arguments, **settings)

    def as_linear(self, x: mx.array) -> mx.array:
        return self._trained_module().as_linear(x)

    def _trained_module(self) -> Any:
        """The module with the trained parameters in the base's dtypes; in evaluation mode, so statistics stay."""
        module = self._copy_with({name: self[name].astype(self.base[name].dtype) for name in self.adapter_params()})
        return module.eval()

    def _copy_with(self, arrays: dict[str, mx.array]) -> nn.Module:
        """A copy of the base with other parameters."""
        module: nn.Module = like(self.base, type(self.base))
        dict.update(module, arrays)
        return module

    def delta(self) -> mx.array:
        if "weight" not in self.adapter_params():
            raise CannotFuse(f"a {type(self.base).__name__} has no weight, so it has no weight update")
        return self["weight"] - self.base["weight"].astype(mx.float32)

    def fuse(self) -> nn.Module:
        """A module of the base's kind with the trained parameters in float32."""
        return self._copy_with(self.adapter_arrays())


def own_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the float arrays that a module holds itself and that training may change."""
    return tuple(name for name, array in _own_arrays(module) if _is_float(array) and name not in STATISTICS)


def _own_arrays(module: nn.Module) -> list[tuple[str, mx.array]]:
    return [(name, value) for name, value in module.items() if isinstance(value, mx.array) and not name.startswith("_")]


def _is_float(array: mx.array) -> bool:
    return mx.issubdtype(array.dtype, mx.floating)
