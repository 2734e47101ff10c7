"""AdaLoRA (arXiv 2303.10512): an update in the form of a singular value decomposition, whose rank training chooses.

    y = W₀x + s·P Λ Q x,  s = α/r,  r the rank it starts from   (eq. 3)

Λ starts at zero, so the wrapped layer equals its base at the start, bit for bit; P and Q start Gaussian. A triplet is a
singular value with its two vectors. `train.adalora` chooses which triplets stay and keeps P and Q nearly orthogonal.
Here a pruned triplet is a zero in Λ. Arrays are oriented as LoRA's: `lora_a` is Qᵀ, `lora_b` is Pᵀ.
"""

from __future__ import annotations

from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.base import AdapterLayer, by_kind
from mlx_lora.adapters.lora import LoRA, LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lora.config import Adapter

# Standard deviation of P and Q at the start, as in the authors' code and PEFT.
DEVIATION = 0.02


class AdaLoRA(LoRA, abstract=True):
    """LoRA's arrays, and Λ as `lora_e`: (r,), or (E, r) for experts. `settings` hold the adapter's rank budget."""

    PRECISE: ClassVar[frozenset[str]] = frozenset({"lora_e"})

    settings: Adapter

    @staticmethod
    def from_base(layer: nn.Module, config: Adapter, *, path: str, key: Any, shared: Any = None) -> AdaLoRA:
        """Wrap a Linear, an Embedding or a SwitchLinear, quantized or not. `key` seeds P and Q."""
        kind = by_kind(layer, AdaLoRALinear, AdaLoRAEmbedding, AdaLoRASwitchLinear)
        return kind(layer, config, path, key)  # type: ignore[no-any-return]

    @staticmethod
    def refusal(layer: nn.Module, config: Adapter, path: str) -> str | None:
        """Why the method can't wrap `layer` and what works instead, or None."""
        if config.init != "default":
            return f"adapter.init {config.init} is not for adalora, which has a start of its own; default works"
        return AdapterLayer.refusal(layer, config, path)

    def adapter_params(self) -> tuple[str, ...]:
        return ("lora_a", "lora_e", "lora_b")

    def start(self, config: Adapter, key: Any) -> None:
        """Draw P and Q, and set Λ to zero."""
        key_a, key_b = mx.random.split(key)
        self.lora_a = mx.random.normal(self.lora_a.shape, scale=DEVIATION, key=key_a)
        self.lora_b = mx.random.normal(self.lora_b.shape, scale=DEVIATION, key=key_b)
        self.lora_e = mx.zeros((*self.lora_a.shape[:-2], self.rank))
        self.settings = config

    def factors(self) -> tuple[mx.array, mx.array]:
        """Q, and P with each vector multiplied by its singular value, oriented like lora_a and lora_b."""
        values = self.lora_e[:, None] if self.lora_e.ndim == 1 else self.lora_e[:, None, :]
        return self.lora_a, values * self.lora_b

    def stored_arrays(self) -> dict[str, mx.array]:
        return self.adapter_arrays()


class AdaLoRALinear(AdaLoRA, LoRALinear):
    """lora_a (in, r), lora_e (r,), lora_b (r, out); x (…, in) -> (…, out)."""


class AdaLoRAEmbedding(AdaLoRA, LoRAEmbedding):
    """lora_a (vocabulary, r), lora_e (r,), lora_b (r, dim); also the output head when embeddings are tied."""


class AdaLoRASwitchLinear(AdaLoRA, LoRASwitchLinear):
    """Each expert has its own triplets: lora_a (E, r, in), lora_e (E, r), lora_b (E, out, r)."""
