"""Random files of every GGUF architecture: an imported model's log-probabilities against llama.cpp's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.models.gguf import import_gguf
from tests.models.tiny_gguf import OWN, write_tiny
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


IDS = np.random.default_rng(1).integers(3, 260, 24).tolist()


@pytest.mark.parametrize("architecture", OWN)
def test_log_probabilities_equal_llama_cpp(
    architecture: str, tmp_path: Path, llama_cpp: Callable[..., LlamaCpp]
) -> None:
    """24 tokens reach beyond the window of 8 that gemma3 and gpt-oss have here."""
    file = write_tiny(tmp_path / "tiny.gguf", architecture)
    import_gguf(file, tmp_path / "out", dtype="float32")
    assert difference(llama_cpp(file), tmp_path / "out", IDS) < 1e-2
