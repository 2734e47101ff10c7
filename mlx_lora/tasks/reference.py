"""A Llama in numpy and float64, after its papers' formulas: what `selftest` holds every device against.

Nothing here imports MLX or another room, so that no change to the package, to mlx-lm or to a kernel alters both sides
alike. Only for models like the embedded base: tied embeddings, no biases, no scaling of the rotary positions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

Weights = dict[str, np.ndarray]

EMBEDDING = "model.embed_tokens.weight"
# The numbers that four bits spell: a sign, two bits of exponent, one of mantissa (OCP Microscaling Formats, 5.3.3).
E2M1 = np.array([sign * value for sign in (1, -1) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])
# Four bits of NF4: QLoRA (arXiv 2305.14314), Appendix E.
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
# Between two points of a central difference; its error is about the square of it.
STEP = 1e-5


@dataclass(frozen=True)
class Llama:
    """`config` as in config.json; `weights` float64 by the names of the safetensors file."""

    config: dict[str, Any]
    weights: Weights

    @classmethod
    def read(cls, folder: Path) -> Llama:
        """The model in a directory, from its one safetensors file."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stored = load_file(folder / "model.safetensors")
        return cls(config, {name: array.astype(np.float64) for name, array in stored.items()})

    def merged(self, adapter: Weights, scale: float) -> Llama:
        """With the update s·A B of every pair `path.lora_a`, `path.lora_b` added to the weight at `path`."""
        weights = dict(self.weights)
        for name in adapter:
            path, _, factor = name.rpartition(".")
            if factor == "lora_a":
                update = scale * (adapter[name] @ adapter[f"{path}.lora_b"])
                weight = f"{path}.weight"
                weights[weight] = weights[weight] + (update if weight == EMBEDDING else update.T)
        return Llama(self.config, weights)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """(B, T) token ids -> (B, T, V)."""
        x = self.weights[EMBEDDING][tokens]
        for index in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{index}."
            x = x + self._attention(self._norm(x, f"{layer}input_layernorm"), f"{layer}self_attn.")
            x = x + self._gated(self._norm(x, f"{layer}post_attention_layernorm"), f"{layer}mlp.")
        return self._norm(x, "model.norm") @ self.weights[EMBEDDING].T

    def loss(self, inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
        """Σ weight · nll / Σ weight, of a batch of (B, T) arrays."""
        logits = self.logits(inputs)
        top = logits.max(axis=-1, keepdims=True)
        total = np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]
        chosen = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return float(((total - chosen) * weights).sum() / weights.sum())

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        """RMSNorm (arXiv 1910.07467): x / √(mean(x²) + ε) · g."""
        mean = np.square(x).mean(axis=-1, keepdims=True)
        return x / np.sqrt(mean + self.config["rms_norm_eps"]) * self.weights[f"{name}.weight"]

    def _attention(self, x: np.ndarray, name: str) -> np.ndarray:
        """Causal softmax(q kᵀ / √d) v; several heads of queries share a head of keys (arXiv 2305.13245)."""
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        q = self._rotated(self._heads(x, f"{name}q_proj", heads))
        k = self._rotated(self._heads(x, f"{name}k_proj", kv_heads)).repeat(heads // kv_heads, axis=1)
        v = self._heads(x, f"{name}v_proj", kv_heads).repeat(heads // kv_heads, axis=1)
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
        scores = np.where(np.tri(x.shape[1], dtype=bool), scores, -np.inf)
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = powers / powers.sum(axis=-1, keepdims=True) @ v
        return self._linear(mixed.swapaxes(1, 2).reshape(*x.shape[:2], -1), f"{name}o_proj")

    def _heads(self, x: np.ndarray, name: str, heads: int) -> np.ndarray:
        return self._linear(x, name).reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)

    def _rotated(self, x: np.ndarray) -> np.ndarray:
        """Rotary positions (arXiv 2104.09864), dimension i turned together with i + d/2, by t · θ^(-2i/d)."""
        half = x.shape[-1] // 2
        turns = np.arange(x.shape[2])[:, None] * self.config["rope_theta"] ** (-np.arange(half) / half)
        one, other = x[..., :half], x[..., half:]
        cos, sin = np.cos(turns), np.sin(turns)
        return np.concatenate([one * cos - other * sin, one * sin + other * cos], axis=-1)

    def _gated(self, x: np.ndarray, name: str) -> np.ndarray:
        """SwiGLU (arXiv 2002.05202): (silu(x G) · x U) D."""
        gate = self._linear(x, f"{name}gate_proj")
        return self._linear(gate / (1 + np.exp(-gate)) * self._linear(x, f"{name}up_proj"), f"{name}down_proj")


def slope(function: Callable[[Weights], float], arrays: Weights, direction: Weights) -> float:
    """Derivative of `function(arrays)` along `direction`, which names the arrays that move, by central difference."""

    def moved(distance: float) -> float:
        return function(arrays | {name: arrays[name] + distance * step for name, step in direction.items()})

    return (moved(STEP) - moved(-STEP)) / (2 * STEP)


def dequantized(
    packed: np.ndarray,
    scales: np.ndarray,
    biases: np.ndarray | None,
    *,
    group_size: int,
    bits: int,
    mode: str,
    nested: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """The float64 weight behind a packed one: uint32 words (…, columns · bits / 32) and a scale a group.

    affine: scale · q + bias.   mxfp4, mxfp8: 2^(scale - 127) · element.   nvfp4: e4m3(scale) · element.
    nf4: scale · NF4[q], where the scale is int8 with `nested` steps and mean: mean + step · scale, a step for each 256.
    Raises ValueError for another mode.
    """
    # one stream of bits, the lowest of the lowest byte first, whatever words they lie in
    stream = np.unpackbits(packed.view(np.uint8), axis=-1, bitorder="little")
    numbers = stream.reshape(*packed.shape[:-1], -1, bits) @ (1 << np.arange(bits))
    groups = numbers.reshape(*scales.shape, group_size)
    if mode == "affine" and biases is not None:
        values = groups * scales.astype(np.float64)[..., None] + biases.astype(np.float64)[..., None]
    elif mode == "mxfp8":
        values = e4m3(groups) * e8m0(scales)[..., None]
    elif mode == "mxfp4":
        values = E2M1[groups] * e8m0(scales)[..., None]
    elif mode == "nvfp4":
        values = E2M1[groups] * e4m3(scales)[..., None]
    elif mode == "nf4":
        if nested is not None:
            steps = nested[0].astype(np.float64).repeat(256)[: scales.size]
            scales = nested[1].astype(np.float64) + steps.reshape(scales.shape) * scales
        values = NF4[groups] * scales.astype(np.float64)[..., None]
    else:
        raise ValueError(f"no formula for mode {mode}")
    return values.reshape(*numbers.shape)


def e8m0(codes: np.ndarray) -> np.ndarray:
    """The powers of two that eight bits spell, from 2⁻¹²⁷ on."""
    return np.asarray(2.0 ** (codes.astype(np.int32) - 127))


def e4m3(codes: np.ndarray) -> np.ndarray:
    """The numbers that eight bits spell: a sign, four bits of exponent (bias 7), three of mantissa; 2⁻⁹ the least."""
    codes = codes.astype(np.int32)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    return np.where(codes & 128, -size, size)
