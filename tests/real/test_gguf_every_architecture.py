"""Random files of every GGUF architecture: an imported model's log-probabilities against llama.cpp's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from mlx_lora.models.gguf import import_gguf
from tests.models.tiny_gguf import OWN, tiny_config, tiny_weights, write_tiny
from tests.real.test_gguf_llamacpp import LlamaCpp, load_float32
from tests.real.test_gguf_llamacpp import llama_cpp as llama_cpp

pytestmark = pytest.mark.real


def ours(directory: Path, ids: list[int]) -> np.ndarray:
    """Log-probabilities of the next token, (vocabulary,), by mlx_lm in float32."""
    model, _ = load_float32(directory)
    logits = model(mx.array([ids]))[0, -1].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits))


def difference(peer: LlamaCpp, directory: Path, ids: list[int]) -> float:
    """The largest difference between both programs over all tokens of the vocabulary that are not improbable."""
    theirs = peer.next_token(ids, 272, chosen=3)
    probable = {token: value for token, value in theirs.items() if value > -20}
    assert len(theirs) == 272 and len(probable) > 200
    own = ours(directory, ids)
    return max(abs(own[token] - value) for token, value in probable.items())


# llama.cpp looks GELU up in a table of half-precision numbers.
TOLERANCE = {"gemma2": 1e-2, "gemma3": 1e-2}
IDS = np.random.default_rng(1).integers(3, 260, 24).tolist()


@pytest.mark.parametrize("architecture", OWN)
def test_log_probabilities_equal_llama_cpp(
    architecture: str, tmp_path: Path, llama_cpp: Callable[..., LlamaCpp]
) -> None:
    """24 tokens reach beyond the window of 8 that gemma3 and gpt-oss have here."""
    file = write_tiny(tmp_path / "tiny.gguf", architecture)
    import_gguf(file, tmp_path / "out", dtype="float32")
    assert difference(llama_cpp(file), tmp_path / "out", IDS) < TOLERANCE.get(architecture, 1e-4)


def factors(count: int) -> dict[str, np.ndarray]:
    return {
        "rope_factors_long.weight": np.linspace(1.0, 20.0, count, dtype=np.float32),
        "rope_factors_short.weight": np.ones(count, np.float32),
    }


LONG = {
    "phi3.rope.scaling.original_context_length": 64,
    "phi3.rope.scaling.attn_factor": float(np.sqrt(1 + np.log(512 / 64) / np.log(64))),
}
YARN = {"type": "yarn", "factor": 8.0, "original_context_length": 64}
SCALINGS: dict[str, tuple[str, dict[str, Any], dict[str, np.ndarray]]] = {
    "gpt-oss yarn": ("gpt-oss", {f"gpt-oss.rope.scaling.{key}": value for key, value in YARN.items()}, {}),
    "qwen2 yarn": ("qwen2", {f"qwen2.rope.scaling.{key}": value for key, value in YARN.items()}, {}),
    "gemma3 linear on the layers without a window": (
        "gemma3", {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}, {},
    ),
    "phi3 long factors": ("phi3", LONG, factors(16)),
    "phi3 long factors on three quarters of a head": ("phi3", LONG | {"phi3.rope.dimension_count": 24}, factors(12)),
}  # fmt: skip


@pytest.mark.parametrize("scaling", SCALINGS)
def test_rope_scaling_equals_llama_cpp(scaling: str, tmp_path: Path, llama_cpp: Callable[..., LlamaCpp]) -> None:
    """400 tokens: a rotation that is off by little already gives other probabilities."""
    architecture, changed, extra = SCALINGS[scaling]
    weights = tiny_weights(architecture, tiny_config(architecture)) | extra
    file = write_tiny(tmp_path / "tiny.gguf", architecture, changed=changed, weights=weights)
    import_gguf(file, tmp_path / "out", dtype="float32")
    ids = np.random.default_rng(2).integers(3, 260, 400).tolist()
    assert difference(llama_cpp(file), tmp_path / "out", ids) < TOLERANCE.get(architecture, 1e-3)


def test_mxfp4_experts_equal_llama_cpp(tmp_path: Path, llama_cpp: Callable[..., LlamaCpp]) -> None:
    """llama.cpp rounds the inputs of packed experts to 8 bits; experts read wrongly would be off by units."""
    file = write_tiny(tmp_path / "tiny.gguf", "gpt-oss", kind=lambda name: Kind.MXFP4 if "_exps" in name else Kind.F32)
    import_gguf(file, tmp_path / "out")
    assert difference(llama_cpp(file), tmp_path / "out", IDS) < 0.05
