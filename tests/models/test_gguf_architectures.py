"""Every GGUF architecture's table both ways, split files, types of tensors, and refusals before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from mlx_lora.errors import ModelError
from mlx_lora.models.gguf import import_gguf
from mlx_lora.models.gguf.names import ARCHITECTURES, architecture_named, architecture_of
from mlx_lora.models.gguf.packing import FORMS, pack
from mlx_lora.models.gguf.settings import metadata_of
from mlx_lora.models.gguf.tensors import layout_of
from mlx_lora.models.gguf.values import Losses, unpacked
from tests.models.test_gguf import left_in, load
from tests.models.tiny_gguf import OWN, SIZES, add, tiny_config, tiny_weights, write_tiny


def arrays_in(directory: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(directory / "model.safetensors")))


def config_in(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "config.json").read_text()))


@pytest.mark.parametrize("architecture", OWN)
def test_a_file_becomes_a_model_that_the_table_takes_back_to_the_same_file(architecture: str, tmp_path: Path) -> None:
    """The config gives the metadata and the names again, and every array the file's values, bit for bit."""
    file = write_tiny(tmp_path / "tiny.gguf", architecture)
    result = import_gguf(file, tmp_path / "out", dtype="float32")
    assert result["architecture"] == architecture and result["errors"] == {}
    config, arrays = config_in(tmp_path / "out"), arrays_in(tmp_path / "out")
    record = architecture_of(config["model_type"])
    assert record is architecture_named(architecture)
    assert metadata_of(record, config) == metadata_of(record, tiny_config(architecture))
    written = {}
    for name, tensor in layout_of(record, config).items():
        own = np.array(arrays.pop(f"{tensor.path}.{tensor.parameter}"))
        assert own.shape == tensor.mlx_shape
        written[f"{name}.weight"] = tensor.weight_to_gguf(own)
        np.testing.assert_array_equal(tensor.weight_to_mlx(written[f"{name}.weight"]), own)
        if tensor.bias != "never":
            written[f"{name}.bias"] = tensor.rows_to_gguf(np.array(arrays.pop(f"{tensor.path}.bias")))
    assert not arrays
    stored = tiny_weights(architecture, tiny_config(architecture))
    assert set(written) == set(stored)
    for name, values in written.items():
        # A norm minus 1 and plus 1 is off by one rounding of float32.
        np.testing.assert_allclose(values, stored[name], rtol=0, atol=1e-7 if "norm" in name else 0, err_msg=name)
    load(tmp_path / "out")[0](mx.array([[5, 9, 200]]))


def test_names_are_those_of_gguf() -> None:
    for name, architecture in ARCHITECTURES.items():
        (known,) = [kind for kind, text in gguf.MODEL_ARCH_NAMES.items() if text == name]
        tensors = {gguf.TENSOR_NAMES[tensor].removeprefix("blk.{bid}.") for tensor in gguf.MODEL_TENSORS[known]}
        assert set(architecture.layer) | set(architecture.model) <= tensors, name


def test_a_model_type_without_a_form_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"model type 'mamba' has no GGUF form here; known: llama, mistral, qwen2"):
        architecture_of("mamba")


def blocks(kind: Kind, rows: int = 8, columns: int = 512) -> np.ndarray:
    """Random blocks of a type: random bits with scales of an ordinary size."""
    random = np.random.default_rng(int(kind))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = random.integers(0, 256, (rows * columns // block, size), np.uint8)
    scales = random.uniform(0.001, 0.1, (len(data), 2)).astype("<f2").view(np.uint8)
    if kind == Kind.MXFP4:
        data[:, 0] = random.integers(0, 200, len(data))
    else:
        width = 4 if kind in (Kind.Q4_1, Kind.Q5_1, Kind.Q4_K, Kind.Q5_K) else 2
        data[:, :width] = scales[:, :width]
    return data.reshape(rows, -1)


@pytest.mark.parametrize("kind", FORMS)
def test_packed_blocks_are_the_files_values(kind: Kind) -> None:
    form, data = FORMS[kind], blocks(kind)
    packed = pack("t", data, kind)
    numbers = {key: value for key, value in packed.items() if key != "weight"}
    if form.mode == "affine":
        numbers = {key: value.astype(mx.float32) for key, value in numbers.items()}
    own = mx.dequantize(packed["weight"], **numbers, **form.settings, dtype=mx.float32)
    expected = gguf.quants.dequantize(data, kind)
    if form.exact:
        np.testing.assert_array_equal(np.array(own), expected)
    else:
        error = np.sqrt(np.square(np.array(own) - expected).mean() / np.square(expected).mean())
        assert 0 < error < 1e-3


@pytest.mark.parametrize("byte", [254, 255])
def test_infinite_powers_of_two_are_refused(byte: int) -> None:
    data = blocks(Kind.MXFP4)
    data[3, 17] = byte
    with pytest.raises(ModelError, match="infinite values"):
        pack("t", data, Kind.MXFP4)


@pytest.mark.parametrize("kind", [Kind.IQ4_NL, Kind.IQ4_XS, Kind.IQ3_S, Kind.IQ2_XXS, Kind.Q6_K, Kind.TQ2_0])
def test_other_types_are_dequantized(kind: Kind) -> None:
    tensor = layout_of(ARCHITECTURES["qwen2"], SIZES)["blk.0.ffn_up"]
    tensor = replace(tensor, shape=(8, 512))
    data = blocks(kind)
    if kind in (Kind.Q6_K, Kind.TQ2_0):
        data.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])[:, -2:] = np.full((1, 1), 0.01, "<f2").view(np.uint8)
    losses = Losses()
    own = unpacked("t.weight", tensor, data, kind, mx.float16, losses)
    expected = gguf.quants.dequantize(data, kind)
    np.testing.assert_array_equal(np.array(own), expected.astype(np.float16))
    error = np.sqrt(np.square(np.array(own).astype(np.float32) - expected).mean() / np.square(expected).mean())
    assert losses.errors().get(kind.name, 0.0) == pytest.approx(error, rel=1e-3)


def test_gpt_oss_keeps_its_experts_in_mxfp4(tmp_path: Path) -> None:
    kind: Callable[[str], Kind] = lambda name: Kind.MXFP4 if "_exps" in name else Kind.Q8_0  # noqa: E731
    file = write_tiny(tmp_path / "tiny.gguf", "gpt-oss", kind=kind)
    result = import_gguf(file, tmp_path / "out")
    quantization = config_in(tmp_path / "out")["quantization"]
    assert result["quantization"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    experts = "model.layers.1.mlp.experts.down_proj"
    assert quantization[experts] == {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    module = load(tmp_path / "out")[0].model.layers[1].mlp.experts.down_proj
    own = mx.dequantize(module.weight, module.scales.astype(mx.uint8), group_size=32, bits=4, mode="mxfp4")
    stored = tiny_weights("gpt-oss", tiny_config("gpt-oss"))["blk.1.ffn_down_exps.weight"]
    expected = gguf.quants.dequantize(gguf.quants.quantize(stored, Kind.MXFP4), Kind.MXFP4)
    np.testing.assert_array_equal(np.array(own.astype(mx.float32)), expected)


WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 128}


def q6_k(tmp_path: Path) -> Path:
    """A qwen3 whose feed-forward matrices are Q6_K, from random blocks, and whose embedding is Q8_0."""
    config = tiny_config("qwen3") | WIDE
    file = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "qwen3")
    write_tiny(tmp_path / "plain.gguf", "qwen3", config)
    reader = gguf.GGUFReader(tmp_path / "plain.gguf")
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            add(writer, name, field.contents())
    for tensor in reader.tensors:
        if ".ffn_" in tensor.name and "norm" not in tensor.name:
            data = blocks(Kind.Q6_K, 256, 256).reshape(-1, 210)
            data[:, -2:] = np.full((len(data), 1), 1e-4, "<f2").view(np.uint8)
            writer.add_tensor(tensor.name, data.reshape(256, -1), raw_dtype=Kind.Q6_K)
        elif tensor.name == "token_embd.weight":
            writer.add_tensor(tensor.name, gguf.quants.quantize(tensor.data, Kind.Q8_0), raw_dtype=Kind.Q8_0)
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_types_without_a_form_become_float16_or_are_packed_again_and_the_error_is_measured(tmp_path: Path) -> None:
    file = q6_k(tmp_path)
    half, packed = import_gguf(file, tmp_path / "half"), import_gguf(file, tmp_path / "packed", pack_bits=6)
    assert 0 < half["errors"]["Q6_K"] < 3e-4 < packed["errors"]["Q6_K"] < 0.02
    assert half["notes"] == [
        "matrices without a packed form in MLX became float16 (6 of Q6_K); --pack 6 keeps them small"
    ]
    assert packed["notes"] == [] and packed["bytes"] < half["bytes"]
    path = "model.layers.0.mlp.up_proj"
    arrays = arrays_in(tmp_path / "packed")
    scales, biases = (arrays[f"{path}.{key}"].astype(mx.float32) for key in ("scales", "biases"))
    own = np.array(mx.dequantize(arrays[f"{path}.weight"], scales, biases, group_size=32, bits=6))
    exact = np.array(arrays_in(tmp_path / "half")[f"{path}.weight"].astype(mx.float32))
    error = np.sqrt(np.square(own - exact).mean() / np.square(exact).mean())
    assert error == pytest.approx(packed["errors"]["Q6_K"], rel=0.05)


@pytest.mark.parametrize(
    ("bits", "dtype", "message"), [(7, "keep", "7 bits"), (4, "float32", "nothing is left to pack")]
)
def test_packing_that_makes_no_sense_is_refused(bits: int, dtype: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        import_gguf(write_tiny(tmp_path / "m.gguf", "qwen2"), tmp_path / "out", dtype=dtype, pack_bits=bits)


def split(folder: Path) -> list[Path]:
    write_tiny(folder / "tiny.gguf", "qwen2", split=10)
    return sorted(folder.glob("tiny-*.gguf"))


def test_a_split_model_is_found_by_any_part(tmp_path: Path) -> None:
    import_gguf(write_tiny(tmp_path / "whole.gguf", "qwen2"), tmp_path / "whole", dtype="float32")
    parts = split(tmp_path)
    assert [part.name for part in parts] == [f"tiny-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for part in (parts[0], parts[2]):
        import_gguf(part, tmp_path / "out", dtype="float32", force=True)
        whole, own = arrays_in(tmp_path / "whole"), arrays_in(tmp_path / "out")
        assert set(own) == set(whole) and all(mx.array_equal(own[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda parts: parts[1].unlink(), "missing beside it: tiny-00002-of-00003.gguf"),
        (lambda parts: parts[1].write_bytes(parts[2].read_bytes()), "not part 2 of 3, though its name says so"),
        (lambda parts: parts[1].write_bytes(parts[1].read_bytes()[:-500]), "truncated or damaged"),
        (lambda parts: parts[0].rename(parts[0].with_name("model.gguf")), "doesn't lead to the others"),
    ],
)
def test_incomplete_split_models_are_refused(damage: Callable[[list[Path]], Any], message: str, tmp_path: Path) -> None:
    parts = split(tmp_path)
    damage(parts)
    file = parts[0] if parts[0].is_file() else tmp_path / "model.gguf"
    with pytest.raises(ModelError, match=message):
        import_gguf(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_metadata_is_left_out_by_name(tmp_path: Path) -> None:
    changed = {"quantize.imatrix.file": "x.dat", "quantize.imatrix.entries_count": 7, "qwen3.something_new": 1}
    changed["tokenizer.chat_template.tool_use"] = "{{ messages }}"
    result = import_gguf(write_tiny(tmp_path / "tiny.gguf", "qwen3", changed=changed), tmp_path / "out")
    names = (
        "quantize.imatrix.file, quantize.imatrix.entries_count, qwen3.something_new, tokenizer.chat_template.tool_use"
    )
    assert result["notes"] == [f"left out metadata that is not known: {names}"]


def test_the_lengths_that_mlx_computes_otherwise_are_named(tmp_path: Path) -> None:
    short = write_tiny(tmp_path / "short.gguf", "gemma2", tiny_config("gemma2") | {"max_position_embeddings": 8192})
    assert import_gguf(short, tmp_path / "short")["notes"] == [
        "mlx_lm computes gemma2 without its window of 4096 tokens"
    ]


REFUSED = [
    ("qwen2", {"qwen2.attention.sliding_window": 64}, "MLX's qwen2 lacks: attention.sliding_window"),
    ("qwen2", {"qwen2.attention.key_length": 16}, "not the hidden size 64 / 2 heads"),
    ("qwen2", {"qwen2.attention.causal": False}, "attention in both directions"),
    ("qwen3", {"qwen3.expert_count": 4}, "mixture of experts is not supported for qwen3"),
    ("qwen3", {"qwen3.attention.value_length": 32}, "qwen3.attention.value_length 32 differs from the head size 64"),
    ("qwen3moe", {"qwen3moe.expert_used_count": None}, "qwen3moe.expert_used_count is None"),
    ("qwen3moe", {"qwen3moe.expert_count": 8}, "blk.0.ffn_gate_inp.weight has shape (4, 64), not (8, 64)"),
    ("qwen3moe", {"qwen3moe.expert_weights_scale": 2.5}, "lacks: expert_weights_scale"),
    (
        "qwen3moe",
        {"qwen3moe.rope.scaling.type": "yarn", "qwen3moe.rope.scaling.factor": 4.0},
        "MLX's qwen3_moe lacks rope scaling yarn; known: none",
    ),
    ("gemma2", {"gemma2.rope.freq_base_swa": 5000.0}, "lacks: rope.freq_base_swa"),
    ("gemma3", {"gemma3.final_logit_softcapping": 30.0}, "lacks: final_logit_softcapping"),
    ("gemma3", {"gemma3.attention.sliding_window_pattern": 9}, "7 layers are fewer than the 9"),
    ("gemma3", {"gemma3.attention.sliding_window_pattern": [True, False, False, True, True, True, False]}, "[True, Fa"),
    ("gemma3", {"gemma3.attention.sliding_window": None}, "gemma3.attention.sliding_window is None"),
    ("phi3", {"phi3.rope.scaling.type": "linear", "phi3.rope.scaling.factor": 2.0}, "lacks rope scaling linear"),
    ("granite", {"granite.logit_scale": None}, "granite.logit_scale is None"),
    ("granite", {"granite.rope.scaling.finetuned": False}, "without rotary embedding"),
    ("lfm2", {"lfm2.attention.head_count_kv": [0, 1]}, "names 2 layers, 1 with heads"),
    ("lfm2", {"lfm2.attention.head_count_kv": [0, 1, 0, 2]}, "head_count_kv is [0, 1, 0, 2], not a positive int"),
    ("lfm2", {"lfm2.attention.head_count_kv": [1, 1, 0, 1]}, "blk.0.attn_q.weight is missing"),
    ("lfm2", {"lfm2.shortconv.l_cache": 4}, "blk.0.shortconv.conv.weight has shape (64, 3), not (64, 4)"),
    ("gpt-oss", {"gpt-oss.attention.sliding_window_pattern": 1}, "MLX needs layers with a window and layers without"),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "changed", "message"), REFUSED)
def test_what_mlx_cannot_compute_is_refused_before_anything_is_written(
    architecture: str, changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = write_tiny(tmp_path / "m.gguf", architecture, changed=changed)
    with pytest.raises(ModelError) as raised:
        import_gguf(file, tmp_path / "out")
    assert message in raised.value.message
    assert left_in(tmp_path) == {"m.gguf"}


@pytest.mark.parametrize(
    ("architecture", "name", "message"),
    [
        ("qwen2", "blk.1.attn_q.bias", "blk.1.attn_q.bias is missing"),
        ("gemma3", "blk.0.post_ffw_norm.weight", "blk.0.post_ffw_norm.weight is missing"),
        ("gpt-oss", "blk.0.attn_sinks.weight", "blk.0.attn_sinks.weight is missing"),
        ("gpt-oss", "output.weight", "output.weight is missing"),
        ("lfm2", "token_embd_norm.weight", "token_embd_norm.weight is missing"),
    ],
)
def test_a_missing_tensor_is_named(architecture: str, name: str, message: str, tmp_path: Path) -> None:
    weights = tiny_weights(architecture, tiny_config(architecture))
    del weights[name]
    with pytest.raises(ModelError, match=message):
        import_gguf(write_tiny(tmp_path / "m.gguf", architecture, weights=weights), tmp_path / "out")


@pytest.mark.parametrize(
    ("architecture", "name"), [("lfm2", "output.weight"), ("gemma2", "output.weight"), ("qwen3", "blk.0.attn_q.bias")]
)
def test_a_tensor_without_a_place_is_named(architecture: str, name: str, tmp_path: Path) -> None:
    weights = tiny_weights(architecture, tiny_config(architecture)) | {name: np.zeros((272, 64), np.float32)}
    with pytest.raises(ModelError, match=f"{name} is unknown"):
        import_gguf(write_tiny(tmp_path / "m.gguf", architecture, weights=weights), tmp_path / "out")
