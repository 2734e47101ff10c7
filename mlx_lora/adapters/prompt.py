"""Prompt tuning (arXiv 2104.08691; LoRA's PreEmbed, arXiv 2106.09685 §5.1): trained embeddings of virtual tokens.

    ids   −1 −2 … −l  5 12 7        embeddings   P₁ P₂ … P_l  E₅ E₁₂ E₇        P (l, dim) trains, E is frozen

A virtual token is a token with a negative id, −1 − i for row i of P. Rows, batches, packing, caches and generation
treat it like any other id, so this wrapper of the token embedding is the only change to a model. `data.virtual` puts
the ids into rows and prompts. The ids are negative because no vocabulary has such ids; rows can therefore contain them
before the model is known. They are never predicted: the output head has no logits for them.

P starts as embeddings of common tokens (§3.2 of the paper), so the first inputs are ones that the model was trained on.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.base import EMBEDDINGS, AdapterLayer, layer_shape
from mlx_lora.adapters.targets import bare_modules, layer_prefixes
from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError, CannotFuse

# The paper draws from the 5,000 most common tokens; a learned vocabulary lists the most common ones first.
COMMON = 5000
NO_UPDATE = "virtual tokens are no update of a weight"


class Prompt(AdapterLayer):
    """soft (l, dim), float32: the embeddings of the ids below 0. `position` is where a row has them."""

    def __init__(self, layer: nn.Module, config: Adapter, key: Any):
        super().__init__()
        vocabulary, _ = layer_shape(layer)
        self.embedding = layer
        self.position = config.position
        tokens = mx.random.randint(0, min(COMMON, vocabulary), (config.virtual_tokens,), key=key)
        self.soft = layer(tokens).astype(mx.float32)

    @staticmethod
    def find(model: nn.Module, config: Adapter) -> list[str]:
        """The token embedding: the embedding outside the layers that has the most rows."""
        prefixes = tuple(layer_prefixes(model))
        rows = {
            path: layer_shape(module)[0]
            for path, module in bare_modules(model).items()
            if isinstance(module, EMBEDDINGS) and not path.startswith(prefixes)
        }
        if not rows:
            raise AdapterError("the model has no token embedding", hint="method lora works on its linear layers")
        return [max(rows, key=lambda path: rows[path])]

    @staticmethod
    def refusal(layer: nn.Module, config: Adapter, path: str) -> str | None:
        if isinstance(layer, EMBEDDINGS):
            return None
        return f"{path} is a {type(layer).__name__}, prompt needs a token embedding; method lora works there"

    @staticmethod
    def from_base(layer: nn.Module, config: Adapter, *, path: str, key: Any, shared: Any = None) -> Prompt:
        """Wrap an Embedding, quantized or not. `key` draws the tokens to start from."""
        return Prompt(layer, config, key)

    @property
    def base(self) -> nn.Module:
        return self["embedding"]  # type: ignore[no-any-return]

    def adapter_params(self) -> tuple[str, ...]:
        return ("soft",)

    def __call__(self, tokens: mx.array) -> mx.array:
        ids = tokens.astype(mx.int32)  # generated ids are unsigned
        virtual = ids < 0
        y = self.embedding(mx.where(virtual, 0, ids))
        soft = self.soft[mx.where(virtual, -1 - ids, 0)]
        return mx.where(virtual[..., None], soft.astype(y.dtype), y)

    def as_linear(self, x: mx.array) -> mx.array:
        """The output head of a model with tied embeddings, which has no logits for virtual tokens."""
        return self.embedding.as_linear(x)

    def __getattr__(self, name: str) -> Any:
        """Any other attribute is the embedding's: some models read its weight."""
        if name in self or "embedding" not in self:
            return super().__getattr__(name)
        return getattr(self["embedding"], name)

    def delta(self) -> mx.array:
        raise CannotFuse(NO_UPDATE, hint="keep them as an adapter")

    def fuse(self) -> nn.Module:
        raise CannotFuse(NO_UPDATE, hint="keep them as an adapter")

    def _extra_repr(self) -> str:
        return f"virtual_tokens={self.soft.shape[0]}, position={self.position}"
