"""What a GGUF file of a model holds: its architecture's name, its metadata, and a tensor for every weight.

A tensor has a name, the path of the MLX module that it comes from, and the order that llama.cpp wants its rows in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_lora.errors import ModelError
from mlx_lora.models.gguf_config import layout_of

# mlx_lm's model types whose module is its llama, and which llama.cpp runs as architecture llama.
LLAMA = ("llama", "mistral")


@dataclass(frozen=True)
class Tensor:
    """`stem` is the tensor's name without `.weight`, `shape` is (out, in) in MLX and numpy's order.

    `heads` is the number of heads whose rows llama.cpp wants in pairs, None where rows stay as they are.
    """

    stem: str
    path: str
    shape: tuple[int, ...]
    heads: int | None = None

    def to_file(self, array: NDArray[Any], *, axis: int = 0) -> NDArray[Any]:
        """`array` with the rows along `axis` in llama.cpp's order."""
        return self._reordered(array, axis, inverse=False)

    def from_file(self, array: NDArray[Any], *, axis: int = 0) -> NDArray[Any]:
        """`array` with the rows along `axis` in MLX's order."""
        return self._reordered(array, axis, inverse=True)

    def _reordered(self, array: NDArray[Any], axis: int, *, inverse: bool) -> NDArray[Any]:
        if self.heads is None:
            return array
        rows = array.shape[axis]
        # MLX rotates the halves of a head, llama.cpp neighbouring rows
        order = np.arange(rows).reshape(self.heads, 2, rows // self.heads // 2).swapaxes(1, 2).reshape(-1)
        return np.take(array, np.argsort(order) if inverse else order, axis=axis)


@dataclass(frozen=True)
class Plan:
    """`fields` is the architecture's own metadata; `tied` says that the embedding is the output head too."""

    architecture: str
    tensors: tuple[Tensor, ...]
    fields: dict[str, Any]
    tied: bool

    @property
    def by_path(self) -> dict[str, Tensor]:
        return {tensor.path: tensor for tensor in self.tensors}


def plan_of(config: dict[str, Any]) -> Plan:
    """The plan for a config.json. Raises ModelError naming an architecture or a setting that GGUF can't say."""
    kind = config["model_type"]
    if kind not in LLAMA:
        raise ModelError(
            f"architecture {kind!r} has no GGUF form here; known: {', '.join(LLAMA)}",
            hint="`mlx-lora fuse` merges it into an MLX model",
        )
    heads = config["num_attention_heads"]
    known = config | {
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", True)),
    }
    if known.get("rope_traditional"):
        raise ModelError("config.json: rope_traditional has no GGUF form")
    rotated = {"attn_q": heads, "attn_k": known["num_key_value_heads"]}
    tensors = tuple(
        Tensor(stem, path, shape, rotated.get(stem.rpartition(".")[2]))
        for stem, (path, shape) in layout_of(known).items()
    )
    return Plan("llama", tensors, _fields(known), known["tie_word_embeddings"])


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    head = config["head_dim"]
    return {
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config.get("max_position_embeddings") or 4096,
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.key_length": head,
        "llama.attention.value_length": head,
        "llama.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "llama.rope.dimension_count": head,
        "llama.rope.freq_base": float(config.get("rope_theta") or 10000.0),
        "llama.vocab_size": config["vocab_size"],
    }
