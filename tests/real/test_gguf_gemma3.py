"""Gemma 3 270M from a Q4_K_M file: its text and its tokens against llama.cpp's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.models.gguf import import_gguf
from mlx_lora.models.gguf.reader import open_gguf
from tests.real.test_gguf_llamacpp import PROMPTS, TEXTS, LlamaCpp, greedy, load_float32, write_f32
from tests.real.test_gguf_llamacpp import llama_cpp as llama_cpp

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def f32(gemma3_gguf: Path, cache: Path) -> Path:
    """The same weights, each value written out as float32."""
    target = cache / "gemma-3-270m.F32-of-Q4_K_M.gguf"
    if not target.is_file():
        reader = gguf.GGUFReader(gemma3_gguf)
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        del fields["general.architecture"]
        tensors = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
        write_f32(target, fields | {"general.file_type": int(gguf.LlamaFileType.ALL_F32)}, tensors, "gemma3")
    return target


@pytest.fixture(scope="module")
def imported(gemma3_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "gemma3"
    import_gguf(gemma3_gguf, out, dtype="float32")
    return out


def test_text_and_tokens_equal_llama_cpp(f32: Path, imported: Path, llama_cpp: Callable[..., LlamaCpp]) -> None:
    model, tokenizer = load_float32(imported)
    peer = llama_cpp(f32)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == peer.tokenize(text, add_special=True), text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text or set("<\u2581") & set(text)
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        theirs = [token for token, _ in peer.greedy(ids, 16)]
        assert greedy(model, ids, 16, tokenizer.eos_token_ids) == theirs, prompt


def test_keep_changes_the_values_by_less_than_a_thousandth(gemma3_gguf: Path, tmp_path: Path) -> None:
    """Q4_K keeps its 4 bits with scales rounded to float16; Q6_K has no such form, and becomes float16."""
    result = import_gguf(gemma3_gguf, tmp_path / "out")
    assert result["errors"] == pytest.approx({"Q4_K": 6.7e-4, "Q6_K": 2.0e-4}, rel=0.1)
    assert result["quantization"] == {"group_size": 32, "bits": 5, "mode": "affine"}
    arrays = mx.load(str(tmp_path / "out/model.safetensors"))
    stored = open_gguf(gemma3_gguf).tensors["blk.0.attn_norm.weight"].data
    np.testing.assert_allclose(np.array(arrays["model.layers.0.input_layernorm.weight"]) + 1.0, stored, rtol=1e-3)
