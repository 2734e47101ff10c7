"""Importing a GGUF base: packed weights bit for bit, the model against one written in numpy, vocabularies, refusals."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

import mlx_lora.models.gguf.convert as importer
from mlx_lora.errors import ModelError, NameTaken
from mlx_lora.models.gguf import import_gguf

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS, CONTEXT = 64, 96, 4, 2, 2, 512
HEAD = HIDDEN // HEADS
THETA, EPSILON = 10000.0, 1e-5
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
Weights = dict[str, np.ndarray]
Metadata = dict[str, Any]


def byte_level_vocabulary() -> Metadata:
    """All 256 bytes in GPT-2's spelling, a few merges, a word no merge leads to, and ChatML's tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "Ġ Ġ", "1 2"]
    joined = [merge.replace(" ", "") for merge in merges]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *spelled, *joined, "xyz"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*tokens, "<tool>"],
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3) + [4],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
    }


def sentencepiece_vocabulary() -> Metadata:
    """Bytes, letters, and a ladder of merges whose order only the scores tell."""
    words = ["ll", "he", "hell", "hello", "▁hello", "▁w", "or", "▁wor", "ld", "▁world", "▁▁", "lo", "▁h"]
    letters = list("▁helowrd.,")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(n) for n in range(1, len(tokens) - 258)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def random_weights(vocabulary: int, *, tied: bool = True, biased: tuple[str, ...] = ()) -> Weights:
    """A llama's weights under Hugging Face's names and in its row order."""
    random = np.random.default_rng(7)
    block = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
        "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    shapes = {"model.embed_tokens": (vocabulary, HIDDEN), "model.norm": (HIDDEN,)}
    shapes |= {} if tied else {"lm_head": (vocabulary, HIDDEN)}
    for n in range(LAYERS):
        shapes |= {f"model.layers.{n}.{name}": shape for name, shape in block.items()}
    weights = {f"{name}.weight": random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        if name.endswith(biased) and biased:
            weights[f"{name}.bias"] = random.normal(size=shape[0]).astype(np.float32)
    return weights


def permuted(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter orders q and k."""
    return values.reshape(heads, 2, HEAD // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def write_gguf(
    file: Path,
    weights: Weights,
    vocabulary: Metadata,
    *,
    kind: Callable[[str], Kind] = lambda name: Kind.F32,
    changed: Metadata | None = None,
    extra: Weights | None = None,
) -> Path:
    """A file as llama.cpp's converter writes it; `changed` replaces metadata, or leaves it out as None."""
    metadata: Metadata = {
        "general.architecture": "llama",
        "llama.block_count": LAYERS, "llama.embedding_length": HIDDEN, "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": KV_HEADS,
        "llama.context_length": CONTEXT, "llama.rope.dimension_count": HEAD, "llama.rope.freq_base": THETA,
        "llama.attention.layer_norm_rms_epsilon": EPSILON,
        **vocabulary, **(changed or {}),
    }  # fmt: skip
    writer = gguf.GGUFWriter(file, metadata.pop("general.architecture"))
    adders = {
        int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool,
        list: writer.add_array,
    }  # fmt: skip
    for key, value in metadata.items():
        if value is not None:
            adders[type(value)](key, value)
    for name, values in weights.items():
        path, _, part = name.rpartition(".")
        layer, _, short = path.removeprefix("model.layers.").partition(".")
        stem = NAMES[path] if path in NAMES else f"blk.{layer}.{NAMES[short]}"
        if stem.endswith(("attn_q", "attn_k")):
            values = permuted(values, HEADS if stem.endswith("q") else KV_HEADS)
        chosen = kind(stem) if values.ndim > 1 else Kind.F32
        writer.add_tensor(f"{stem}.{part}", gguf.quants.quantize(values, chosen), raw_dtype=chosen)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def tiny(file: Path, **options: Any) -> Path:
    vocabulary = byte_level_vocabulary()
    return write_gguf(file, random_weights(len(vocabulary["tokenizer.ggml.tokens"])), vocabulary, **options)


def load(directory: Path) -> tuple[Any, Any]:
    """Through mlx_lm, unchanged, then to float32 with the scales of packed weights."""
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(directory))
    model.set_dtype(mx.float32)
    return model, tokenizer


def reference_logits(weights: Weights, ids: list[int]) -> np.ndarray:
    """Llama in numpy and float64, from Hugging Face's weights: (len(ids), vocabulary)."""
    exact = {name: values.astype(np.float64) for name, values in weights.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * exact[f"{name}.weight"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ exact[f"{name}.weight"].T + exact.get(f"{name}.bias", 0.0)

    angles = np.arange(len(ids))[:, None] * THETA ** (-np.arange(0, HEAD, 2) / HEAD)
    cos, sin = np.cos(angles), np.sin(angles)

    def rotate(x: np.ndarray) -> np.ndarray:  # (heads, tokens, HEAD), halves
        a, b = np.split(x, 2, -1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    h = exact["model.embed_tokens.weight"][ids]
    for n in range(LAYERS):
        at = f"model.layers.{n}"
        x = norm(h, f"{at}.input_layernorm")
        q, k, v = (linear(x, f"{at}.self_attn.{p}_proj").reshape(len(ids), -1, HEAD).swapaxes(0, 1) for p in "qkv")
        k, v = (np.repeat(t, HEADS // KV_HEADS, axis=0) for t in (rotate(k), v))
        scores = rotate(q) @ k.swapaxes(1, 2) / np.sqrt(HEAD)
        scores = np.where(np.tri(len(ids), dtype=bool), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (shares / shares.sum(-1, keepdims=True)) @ v
        h = h + linear(mixed.swapaxes(0, 1).reshape(len(ids), -1), f"{at}.self_attn.o_proj")
        x = norm(h, f"{at}.post_attention_layernorm")
        gate = linear(x, f"{at}.mlp.gate_proj")
        h = h + linear(gate / (1 + np.exp(-gate)) * linear(x, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
    return linear(norm(h, "model.norm"), "lm_head" if "lm_head.weight" in exact else "model.embed_tokens")


def left_in(folder: Path) -> set[str]:
    """Everything in a test's folder, hidden leftovers too, beside the home that every test gets there."""
    return set(os.listdir(folder)) - {"home"}


def modules(model: Any) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if "weight" in module}


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0])
def test_packed_weights_are_the_files_own_values(kind: Kind, tmp_path: Path) -> None:
    vocabulary = byte_level_vocabulary()
    weights = random_weights(len(vocabulary["tokenizer.ggml.tokens"]), tied=False)
    result = import_gguf(write_gguf(tmp_path / "m.gguf", weights, vocabulary, kind=lambda _: kind), tmp_path / "out")
    assert result["quantization"] == {"group_size": 32, "bits": 8 if kind == Kind.Q8_0 else 4, "mode": "affine"}
    model, _ = load(tmp_path / "out")
    packed = {path: module for path, module in modules(model).items() if "scales" in module}
    assert len(packed) == 7 * LAYERS + 2
    for path, module in packed.items():
        values = mx.dequantize(module.weight, module.scales, module.biases, group_size=32, bits=module.bits)
        # Quantization is by row, so it commutes with the order of rows that the file has and MLX hasn't.
        expected = gguf.quants.dequantize(gguf.quants.quantize(weights[f"{path}.weight"], kind), kind)
        np.testing.assert_array_equal(np.array(values), expected, path)


def test_types_may_differ_from_tensor_to_tensor(tmp_path: Path) -> None:
    kinds = {"token_embd": Kind.Q8_0, "attn_q": Kind.Q4_0, "attn_v": Kind.F16, "ffn_down": Kind.BF16}
    kinds["attn_output"] = Kind.Q5_0
    vocabulary = byte_level_vocabulary()
    weights = random_weights(len(vocabulary["tokenizer.ggml.tokens"]))
    file = tmp_path / "m.gguf"
    write_gguf(file, weights, vocabulary, kind=lambda stem: kinds.get(stem.split(".")[-1], Kind.Q4_1))
    result = import_gguf(file, tmp_path / "out")
    assert result["tensors"] == {"Q8_0": 1, "F32": 5, "Q4_0": 2, "Q4_1": 6, "F16": 2, "Q5_0": 2, "BF16": 2}
    quantization = json.loads((tmp_path / "out/config.json").read_text())["quantization"]
    assert quantization["bits"] == 4
    assert quantization["model.embed_tokens"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert quantization["model.layers.1.self_attn.v_proj"] is False
    assert "model.layers.1.self_attn.q_proj" not in quantization
    for path, module in modules(load(tmp_path / "out")[0]).items():
        kind = kinds.get(NAMES.get(path, NAMES.get(path.split(".", 3)[-1], "")), Kind.Q4_1)
        if "scales" in module:
            values = mx.dequantize(module.weight, module.scales, module.biases, group_size=32, bits=module.bits)
        else:
            values, kind = module.weight, kind if module.weight.ndim > 1 else Kind.F32
        expected = gguf.quants.dequantize(gguf.quants.quantize(weights[f"{path}.weight"], kind), kind)
        expected = expected if "scales" in module else expected.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(np.array(values), expected, path)


@pytest.mark.parametrize("tied", [True, False])
def test_float32_import_computes_what_the_original_weights_do(tied: bool, tmp_path: Path) -> None:
    vocabulary = byte_level_vocabulary()
    weights = random_weights(len(vocabulary["tokenizer.ggml.tokens"]), tied=tied)
    result = import_gguf(write_gguf(tmp_path / "m.gguf", weights, vocabulary), tmp_path / "out", dtype="float32")
    assert result["quantization"] is None and result["dtype"] == "float32"
    ids = [1, 40, 200, 7, 7, 99, 2]
    logits = np.array(load(tmp_path / "out")[0](mx.array([ids]))[0])
    np.testing.assert_allclose(logits, reference_logits(weights, ids), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("biased", [("q_proj", "k_proj", "v_proj"), ("q_proj", "up_proj", "down_proj"), ("o_proj",)])
def test_biases_are_kept_and_absent_ones_add_nothing(biased: tuple[str, ...], tmp_path: Path) -> None:
    vocabulary = byte_level_vocabulary()
    weights = random_weights(len(vocabulary["tokenizer.ggml.tokens"]), biased=biased)
    import_gguf(write_gguf(tmp_path / "m.gguf", weights, vocabulary), tmp_path / "out", dtype="float32")
    ids = [5, 40, 200, 7]
    logits = np.array(load(tmp_path / "out")[0](mx.array([ids]))[0])
    np.testing.assert_allclose(logits, reference_logits(weights, ids), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", ["keep", "float16"])
def test_everything_but_packed_weights_has_one_half_dtype(dtype: str, tmp_path: Path) -> None:
    """One float32 norm would make a GPU compute everything after it in float32."""
    import_gguf(tiny(tmp_path / "m.gguf", kind=lambda _: Kind.Q4_1), tmp_path / "out", dtype=dtype)
    arrays = mx.load(str(tmp_path / "out/model.safetensors"))
    floats = {array.dtype for array in arrays.values() if mx.issubdtype(array.dtype, mx.floating)}
    assert floats == {mx.float16}
    assert any(name.endswith(".scales") for name in arrays) == (dtype == "keep")


def test_shards_and_their_index_hold_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny(tmp_path / "m.gguf", kind=lambda _: Kind.Q8_0)
    import_gguf(file, tmp_path / "whole")
    monkeypatch.setattr(importer, "SHARD_BYTES", 20_000)
    import_gguf(file, tmp_path / "parts")
    parts = sorted((tmp_path / "parts").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "parts/model.safetensors.index.json").read_text())
    assert len(parts) > 2 and all(part.stat().st_size < 25_000 for part in parts[1:])
    assert sorted(set(index["weight_map"].values())) == [part.name for part in parts]
    ids = mx.array([[1, 5, 9]])
    assert mx.array_equal(load(tmp_path / "whole")[0](ids), load(tmp_path / "parts")[0](ids))


def test_result_progress_and_replacing(tmp_path: Path) -> None:
    file, out = tiny(tmp_path / "m.gguf"), tmp_path / "out"
    steps: list[tuple[int, int]] = []
    result = import_gguf(file, out, on_progress=lambda done, total: steps.append((done, total)))
    assert steps == [(n, 20) for n in range(1, 21)]
    assert result["architecture"] == "llama" and result["out"] == str(out)
    assert result["bytes"] == sum(part.stat().st_size for part in out.iterdir())
    with pytest.raises(NameTaken):
        import_gguf(file, out)
    import_gguf(file, out, force=True)


def llama3_factors(head: int, theta: float, factor: float, high: float = 4.0) -> np.ndarray:
    waves = 2 * np.pi * theta ** (np.arange(0, head, 2) / head)
    smooth = np.clip((8192 / waves - 1) / (high - 1), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def test_config_says_what_the_file_says(tmp_path: Path) -> None:
    import_gguf(tiny(tmp_path / "m.gguf"), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    expected = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "vocab_size": 272, "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float16",
    }  # fmt: skip
    assert {key: config.get(key) for key in expected} == expected
    assert "rope_scaling" not in config


@pytest.mark.parametrize(
    ("changed", "factors", "expected"),
    [
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None, None),
        ({"llama.rope.scale_linear": 2.0}, None, {"rope_type": "linear", "factor": 2.0}),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            None,
            {"rope_type": "linear", "factor": 4.0},
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 8.0,
                "llama.rope.scaling.original_context_length": 64,
            },
            None,
            {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        ),
        (
            {"llama.rope.freq_base": 500000.0},
            llama3_factors(HEAD, 500000.0, 32.0),
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        ({}, np.ones(HEAD // 2, np.float32), None),
    ],
)
def test_rope_scaling(changed: Metadata, factors: np.ndarray | None, expected: Any, tmp_path: Path) -> None:
    extra = {} if factors is None else {"rope_freqs.weight": factors}
    import_gguf(tiny(tmp_path / "m.gguf", changed=changed, extra=extra), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text()).get("rope_scaling") == expected
    load(tmp_path / "out")[0](mx.array([[1, 2, 3]]))


ROUND_TRIPS = ("hello world", "  hello", "ünïcödé 日本", "12 x\n\n\ty", "a<|im_end|>b")


def test_byte_level_tokenizer(tmp_path: Path) -> None:
    import_gguf(tiny(tmp_path / "m.gguf"), tmp_path / "out")
    _, tokenizer = load(tmp_path / "out")
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("hello world 12<tool><|im_end|>"))
    assert pieces == ["hello", "Ġworld", "Ġ", "1", "2", "<tool>", "<|im_end|>"]  # digits are never merged
    for text in ROUND_TRIPS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("hello<tool><|im_end|>"), skip_special_tokens=True) == "hello<tool>"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token_id) == ("<|im_start|>", "<|im_end|>", 2)
    assert tokenizer.eos_token_ids == {2, 0}
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}]) == [1, *tokenizer.encode("hello"), 2]


@pytest.mark.parametrize(
    ("rule", "changed", "expected"),
    [
        ("smollm", {}, ["hello"]),
        ("llama-bpe", {}, ["<|im_start|>", "hello"]),
        ("llama-bpe", {"tokenizer.ggml.add_bos_token": False}, ["hello"]),
        ("smollm", {"tokenizer.ggml.add_eos_token": True}, ["hello", "<|im_end|>"]),
    ],
)
def test_text_begins_and_ends_as_the_file_asks(
    rule: str, changed: Metadata, expected: list[str], tmp_path: Path
) -> None:
    import_gguf(tiny(tmp_path / "m.gguf", changed={"tokenizer.ggml.pre": rule} | changed), tmp_path / "out")
    _, tokenizer = load(tmp_path / "out")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("hello")) == expected


@pytest.mark.parametrize(("rule", "expected"), [("llama-bpe", ["xyz"]), ("gpt-2", ["x", "y", "z"])])
def test_only_some_rules_take_a_word_that_is_a_token_whole(rule: str, expected: list[str], tmp_path: Path) -> None:
    changed = {"tokenizer.ggml.pre": rule, "tokenizer.ggml.add_bos_token": False}
    import_gguf(tiny(tmp_path / "m.gguf", changed=changed), tmp_path / "out")
    _, tokenizer = load(tmp_path / "out")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("xyz")) == expected


def test_an_ordinary_token_named_as_unknown_stays_ordinary(tmp_path: Path) -> None:
    """Naming "!" as the unknown token would drop it from everything that is decoded."""
    import_gguf(tiny(tmp_path / "m.gguf", changed={"tokenizer.ggml.unknown_token_id": 3}), tmp_path / "out")
    _, tokenizer = load(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("hello!"), skip_special_tokens=True) == "hello!"


@pytest.mark.parametrize("leading", [True, False])
def test_sentencepiece_tokenizer(leading: bool, tmp_path: Path) -> None:
    vocabulary = sentencepiece_vocabulary() | {"tokenizer.ggml.add_space_prefix": leading}
    weights = random_weights(len(vocabulary["tokenizer.ggml.tokens"]))
    import_gguf(write_gguf(tmp_path / "m.gguf", weights, vocabulary), tmp_path / "out")
    _, tokenizer = load(tmp_path / "out")
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("hello world"))
    assert pieces == ["<s>", "▁hello" if leading else "hello", "▁world"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("é"))[-2:] == ["<0xC3>", "<0xA9>"]
    for text in (*ROUND_TRIPS, "   ", "held.,"):
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    detokenizer = tokenizer.detokenizer
    for token in tokenizer.encode("hello  wörld", add_special_tokens=False):
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert detokenizer.text == "hello  wörld"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba' is not supported; known: llama, qwen2"),
        ({"general.type": "adapter"}, "type 'adapter'"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"llama.expert_count": 8}, "mixture of experts is not supported for llama"),
        ({"llama.attention.scale": 0.5}, "settings that MLX's llama lacks: attention.scale"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count 8 differs from the head size 16"),
        ({"llama.embedding_length": None}, "llama.embedding_length is None"),
        ({"llama.embedding_length": 128, "llama.rope.dimension_count": 32}, "has shape (272, 64), not (272, 128)"),
        ({"llama.block_count": 3}, "blk.2.attn_norm.weight is missing"),
        ({"llama.block_count": 1 << 30}, "too few"),
        ({"llama.block_count": 1 << 31}, "not a positive int that MLX can hold"),
        ({"llama.rope.freq_base": float("inf")}, "llama.rope.freq_base is inf"),
        ({"llama.rope.scaling.type": 3}, "values of the wrong type: llama.rope.scaling.type"),
        ({"llama.rope.scaling.factor": "x"}, "values of the wrong type: llama.rope.scaling.factor"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "values of the wrong type: tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": "h e"}, "values of the wrong type: tokenizer.ggml.merges"),
        ({"tokenizer.ggml.eos_token_id": "x"}, "values of the wrong type: tokenizer.ggml.eos_token_id"),
        ({"tokenizer.chat_template": 5}, "values of the wrong type: tokenizer.chat_template"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0}, "rope scaling is not supported"),
        ({"llama.rope.scaling.attn_factor": 1.5}, "rope scaling is not supported"),
        ({"tokenizer.ggml.pre": "smolm"}, "pre-tokenizer 'smolm' is not supported; did you mean 'smollm'?"),
        ({"tokenizer.ggml.pre": None}, "doesn't say how its tokenizer splits words"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer type 't5' is not supported; known: gpt2, llama"),
        ({"tokenizer.ggml.model": "llama"}, "0 scores for 272 tokens"),
        ({"tokenizer.ggml.tokens": None}, "vocabulary is incomplete"),
        ({"tokenizer.ggml.merges": None}, "has no merges"),
        ({"tokenizer.ggml.merges": ["h zz"]}, "vocabulary is inconsistent"),
        ({"tokenizer.ggml.merges": ["he"]}, "merges that are not pairs"),
        ({"tokenizer.ggml.eos_token_id": 999}, "eos token is outside its 272 tokens"),
    ],
)
def test_refusals_name_their_reason_and_leave_nothing(changed: Metadata, message: str, tmp_path: Path) -> None:
    file = tiny(tmp_path / "m.gguf", changed=changed)
    with pytest.raises(ModelError) as raised:
        import_gguf(file, tmp_path / "out")
    assert message in raised.value.message
    assert left_in(tmp_path) == {"m.gguf"}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"blk.0.ffn_gate_exps.weight": np.zeros((2, 96, 64), np.float32)}, "mixture of experts"),
        ({"blk.0.attn_q_norm.weight": np.zeros(16, np.float32)}, "blk.0.attn_q_norm.weight is unknown"),
        ({"blk.0.attn_q.scale": np.ones(1, np.float32)}, "blk.0.attn_q.scale is unknown"),
        ({"output_norm.bias": np.zeros(64, np.float32)}, "output_norm.bias is unknown"),
        ({"blk.0.attn_q.bias": np.zeros(16, np.float32)}, "blk.0.attn_q.bias has shape (16,), not (64,)"),
        ({"blk.0.attn_q.bias": np.full(64, 1e6, np.float32)}, "blk.0.attn_q.bias goes beyond mlx.core.float16"),
        ({"blk.0.attn_q.bias": np.full(64, np.nan, np.float32)}, "or is damaged"),
        ({"rope_freqs.weight": np.linspace(1, 8, 8, dtype=np.float32)}, "not Llama 3's rope scaling"),
        ({"rope_freqs.weight": llama3_factors(HEAD, THETA, 8.0, high=8.0)}, "not Llama 3's rope scaling"),
    ],
)
def test_tensors_without_a_place_are_refused(extra: Weights, message: str, tmp_path: Path) -> None:
    file = tiny(tmp_path / "m.gguf", extra=extra)
    with pytest.raises(ModelError) as raised:
        import_gguf(file, tmp_path / "out")
    assert message in raised.value.message
    assert left_in(tmp_path) == {"m.gguf"}


def test_scales_beyond_float16_are_refused_under_keep_only(tmp_path: Path) -> None:
    vocabulary = byte_level_vocabulary()
    weights = random_weights(len(vocabulary["tokenizer.ggml.tokens"]))
    weights["model.layers.1.mlp.up_proj.weight"][3, 40] = 80_000.0  # d = 630, and -128 d is out of range
    file = write_gguf(tmp_path / "m.gguf", weights, vocabulary, kind=lambda _: Kind.Q8_0)
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight goes beyond float16") as raised:
        import_gguf(file, tmp_path / "out")
    assert raised.value.hint == "--dtype float32"
    import_gguf(file, tmp_path / "out", dtype="float32")


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="dtype 'int3' is not supported; known: keep, float16, float32"):
        import_gguf(tiny(tmp_path / "m.gguf"), tmp_path / "out", dtype="int3")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a GGUF file"),
        (b"PK\x03\x04 some other file", "not a GGUF file"),
        (b"GGUF", "ends inside its metadata"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "claims 1152921504606846976 fields"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "claims 1152921504606846976 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 100), "ends inside its metadata"),
        (b"GGUF" + struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"k", 9, 5, 1 << 60), "ends inside its metadata"),
    ],
)
def test_files_that_are_not_gguf(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError) as raised:
        import_gguf(file, tmp_path / "out")
    assert message in raised.value.message
    assert left_in(tmp_path) == {"m.gguf"}


def raw_gguf(*tensors: tuple[list[int], int, int], alignment: int | None = None, data: int = 128) -> bytes:
    """A file of nothing but tensors, each (dimensions, type, offset), and the alignment it claims."""
    fields = b"" if alignment is None else struct.pack("<Q17sII", 17, b"general.alignment", 4, alignment)
    infos = b"".join(
        struct.pack(f"<QcI{len(shape)}QIQ", 1, b"%c" % (97 + n), len(shape), *shape, kind, offset)
        for n, (shape, kind, offset) in enumerate(tensors)
    )
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 1 if fields else 0) + fields + infos
    return head + bytes(-len(head) % (alignment or 32)) + bytes(data)


F32, Q8_0 = int(Kind.F32), int(Kind.Q8_0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (raw_gguf(([8], F32, 0), ([8], F32, 32)), "architecture None"),  # sound as far as it goes
        (raw_gguf(([8], F32, 0), ([8], F32, 0)), "tensors overlap"),
        (raw_gguf(([16], F32, 0), ([8], F32, 32)), "tensors overlap"),
        (raw_gguf(([8], F32, 4)), "isn't aligned"),
        (raw_gguf(([8], F32, 128)), "ends inside its tensors"),
        (raw_gguf(([8], F32, 1 << 40)), "ends inside its tensors"),
        (raw_gguf(([33], F32, 0)), "ends inside its tensors"),
        (raw_gguf(([1 << 32, 1 << 32], F32, 0)), "ends inside its tensors"),  # 0 bytes, counted in 64 bits
        (raw_gguf(([0], F32, 0)), "has the shape [0]"),
        (raw_gguf(([33], Q8_0, 0)), "has the shape [33], in blocks of 32"),
        (raw_gguf(([], F32, 0)), "has 0 dimensions"),
        (raw_gguf(([1] * 5, F32, 0)), "has 5 dimensions"),
        (raw_gguf(([8], 77, 0)), "77 is not a valid GGMLQuantizationType"),
        (raw_gguf(([8], F32, 0), alignment=64), "architecture None"),
        (raw_gguf(([8], F32, 32), alignment=64), "isn't aligned"),
        (raw_gguf(([8], F32, 0), alignment=48), "no power of two"),
    ],
)
def test_headers_are_followed_to_their_end(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError) as raised:
        import_gguf(file, tmp_path / "out")
    assert message in raised.value.message


def test_arrays_longer_than_any_models_are_refused_before_they_are_read(tmp_path: Path) -> None:
    """The reader makes objects of every element: a byte each in the file would be a gigabyte in memory."""
    count = (1 << 22) + 1
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"k", 9, 0, count) + bytes(count))
    with pytest.raises(ModelError, match="more than 4194304 elements"):
        import_gguf(file, tmp_path / "out")


def test_a_token_longer_than_any_is_refused_before_its_merges_are_sought(tmp_path: Path) -> None:
    vocabulary = sentencepiece_vocabulary()
    vocabulary["tokenizer.ggml.tokens"][-1] = "x" * 5000
    weights = random_weights(len(vocabulary["tokenizer.ggml.tokens"]))
    with pytest.raises(ModelError, match="a token of 5000 characters"):
        import_gguf(write_gguf(tmp_path / "m.gguf", weights, vocabulary), tmp_path / "out")


@pytest.mark.parametrize("name", ["m.bin", "m.pt", "m.txt"])
def test_a_file_of_another_name_is_not_opened(name: str, tmp_path: Path) -> None:
    file = tiny(tmp_path / "m.gguf").rename(tmp_path / name)
    with pytest.raises(ModelError, match="not a GGUF file"):
        import_gguf(file, tmp_path / "out")
    import_gguf(file.rename(tmp_path / "sha256-0123"), tmp_path / "out")


@pytest.mark.parametrize("name", ["absent.gguf", "."])
def test_what_is_not_a_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a GGUF file"):
        import_gguf(tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize("share", [0.01, 0.1, 0.2, 0.3, 0.5, 0.9, 0.999])
def test_truncated_files(share: float, tmp_path: Path) -> None:
    file = tiny(tmp_path / "m.gguf", kind=lambda _: Kind.Q4_0)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    with pytest.raises(ModelError, match="truncated or damaged") as raised:
        import_gguf(file, tmp_path / "out")
    assert raised.value.hint
    assert left_in(tmp_path) == {"m.gguf"}


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_header_never_escapes_as_another_error(seed: int, tmp_path: Path) -> None:
    """One byte changed somewhere before the weights: refused in words, or harmless."""
    file = tiny(tmp_path / "m.gguf", kind=lambda _: Kind.Q4_0)
    content = bytearray(file.read_bytes())
    start = gguf.GGUFReader(file).data_offset
    random = np.random.default_rng(seed)
    content[random.integers(start)] ^= 1 << random.integers(8)
    file.write_bytes(content)
    try:
        import_gguf(file, tmp_path / "out")
    except ModelError:
        assert left_in(tmp_path) == {"m.gguf"}
