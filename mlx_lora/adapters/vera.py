"""VeRA (arXiv 2310.11454): two trained vectors per layer, with one pair of random matrices for all layers.

    y = W₀x + b ⊙ B (d ⊙ A x)   (eq. 2), so Δ = diag(b) B diag(d) A

A (r, largest in) and B (largest out, r) are frozen and drawn from `projection_seed` with Kaiming's uniform bound
√(6/fan in), as PEFT draws them; each layer uses their first columns and rows. d starts at 0.1 and b at zero. There is
no scale, since b takes its place. The rank may be larger than in LoRA, since it adds only r numbers per layer.

Of what is trained here only the vectors are stored. The pair is drawn again when an adapter is loaded. Its values
depend on the seed and on the largest dimensions of the wrapped modules, so the same modules must be wrapped. An adapter
from elsewhere has its own pair in its file, since other generators draw other numbers (`store.fitting`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.base import EXPERTS, LINEARS, AdapterLayer, layer_shape
from mlx_lora.config import Adapter
from mlx_lora.models.trunk.dropout import Dropout

D_INITIAL = 0.1


class VeRA(AdapterLayer, abstract=True):
    """The common base of both classes. `VeRA.from_base` chooses the class for a layer."""

    PRECISE: ClassVar[frozenset[str]] = frozenset({"vera_b", "vera_d"})

    def __init__(self, layer: nn.Module, config: Adapter, pair: tuple[mx.array, mx.array]):
        super().__init__()
        self.rank = config.rank
        self.dropout = Dropout(config.dropout)
        self.linear = layer
        *experts, outputs, inputs = layer_shape(layer)
        self.vera_d = mx.full((*experts, self.rank), D_INITIAL)
        self.vera_b = mx.zeros((*experts, outputs))
        # Not a parameter, since its name starts with an underscore. All wrappers hold the same two arrays.
        self._pair = pair

    @staticmethod
    def refusal(layer: nn.Module, config: Adapter, path: str) -> str | None:
        if isinstance(layer, (*LINEARS, *EXPERTS)):
            return None
        return f"VeRA is for linear layers, and {path} is of type {type(layer).__name__}; method lora works"

    @staticmethod
    def shared(layers: dict[str, nn.Module], config: Adapter) -> tuple[mx.array, mx.array]:
        """The frozen pair for all of `layers`: Aᵀ (largest in, r) and B (largest out, r), float32.

        The rank is their last dimension, so a layer's part of them is a slice of whole rows, which needs no copy.
        """
        shapes = [layer_shape(layer) for layer in layers.values()]
        inputs, outputs = max(shape[-1] for shape in shapes), max(shape[-2] for shape in shapes)
        key_a, key_b = mx.random.split(mx.random.key(config.projection_seed))
        bound_a, bound_b = (6 / inputs) ** 0.5, (6 / config.rank) ** 0.5
        return (
            mx.random.uniform(-bound_a, bound_a, (inputs, config.rank), key=key_a),
            mx.random.uniform(-bound_b, bound_b, (outputs, config.rank), key=key_b),
        )

    @staticmethod
    def from_base(layer: nn.Module, config: Adapter, *, path: str, key: Any, shared: Any = None) -> VeRA:
        """Wrap a Linear or a SwitchLinear, packed or not. `shared` is the frozen pair; `key` isn't used."""
        pair = VeRA.shared({path: layer}, config) if shared is None else shared
        return (VeRASwitchLinear if isinstance(layer, EXPERTS) else VeRALinear)(layer, config, pair)

    @property
    def base(self) -> nn.Module:
        return self["linear"]

    def adapter_params(self) -> tuple[str, ...]:
        return ("vera_b", "vera_d")

    def projections(self) -> tuple[mx.array, mx.array]:
        """This layer's part of the frozen pair: Aᵀ (in, r) and B (out, r)."""
        outputs, inputs = layer_shape(self.base)[-2:]
        a, b = self._pair
        return a[:inputs], b[:outputs]

    def delta(self) -> mx.array:
        a, b = self.projections()
        return self.vera_b[..., None] * ((b * self.vera_d[..., None, :]) @ a.T)

    def _extra_repr(self) -> str:
        return f"rank={self.rank}"


class VeRALinear(VeRA):
    """vera_d (r,), vera_b (out,); x (…, in) -> (…, out)."""

    def __call__(self, x: mx.array) -> mx.array:
        a, b = (array.astype(x.dtype) for array in self.projections())
        z = (self.dropout(x) @ a) * self.vera_d.astype(x.dtype)
        return self.linear(x) + (z @ b.T) * self.vera_b.astype(x.dtype)


class VeRASwitchLinear(VeRA):
    """Each expert has its own vectors; all share the pair: vera_d (E, r), vera_b (E, out)."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        a, b = (array.astype(x.dtype) for array in self.projections())
        vector_d, vector_b = (vector.astype(x.dtype)[indices][..., None, :] for vector in (self.vera_d, self.vera_b))
        z = (self.dropout(x) @ a) * vector_d
        return self.linear(x, indices, sorted_indices=sorted_indices) + (z @ b.T) * vector_b
