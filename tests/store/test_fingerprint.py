"""A fingerprint is of the tensors alone: not of where they lie, in how many files, or who wrote them."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_lora import files
from mlx_lora.config import Quantize
from mlx_lora.errors import ModelError
from mlx_lora.models.chat_format import ChatFormat
from mlx_lora.models.load import load_stored
from mlx_lora.models.save import save
from mlx_lora.store import fingerprint
from tests.conftest import TEMPLATE, write_model, write_tokenizer

FILE = "model.safetensors"


@pytest.fixture
def directory(tiny_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_path, tmp_path / "copy"))


def test_one_file_or_two_are_the_same_base(directory: Path) -> None:
    whole = fingerprint.of_directory(directory)
    tensors = dict(mx.load(str(directory / FILE)))
    mx.eval(tensors)
    (directory / FILE).unlink()
    for index, names in enumerate((sorted(tensors)[5:], sorted(tensors)[:5])):
        part = {name: tensors[name] for name in reversed(names)}
        mx.save_safetensors(str(directory / f"model-{index}.safetensors"), part, {"other": "metadata"})
    assert fingerprint.of_directory(directory) == whole


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", [None, Quantize(bits=3), Quantize(mode="mxfp4")], ids=["plain", "3", "mxfp4"])
def test_a_model_has_the_fingerprint_of_its_directory(
    tmp_path: Path, dtype: mx.Dtype, quantization: Quantize | None
) -> None:
    loaded = load_stored(write_model(tmp_path / "m", dtype=dtype), quantization=quantization)
    save(loaded, tmp_path / "saved")
    assert fingerprint.of_model(loaded.model) == fingerprint.of_directory(tmp_path / "saved")


def renamed(tensors: dict[str, mx.array]) -> None:
    tensors["model.norm.weights"] = tensors.pop("model.norm.weight")


def reshaped(tensors: dict[str, mx.array]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].reshape(1, -1)


def retyped(tensors: dict[str, mx.array]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].view(mx.uint32)


def one_bit(tensors: dict[str, mx.array]) -> None:
    bits = tensors["model.norm.weight"].view(mx.uint32)
    bits[17] = bits[17] ^ 1
    tensors["model.norm.weight"] = bits.view(mx.float32)


@pytest.mark.parametrize("change", [renamed, reshaped, retyped, one_bit])
def test_any_change_of_a_tensor_is_another_base(directory: Path, change: Any) -> None:
    before = fingerprint.of_directory(directory)
    tensors = dict(mx.load(str(directory / FILE)))
    mx.eval(tensors)
    change(tensors)
    (directory / FILE).unlink()
    mx.save_safetensors(str(directory / FILE), tensors)
    assert fingerprint.of_directory(directory) != before


def test_it_is_computed_once_and_again_after_a_change(
    directory: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[Path] = []
    tensors = files.tensors
    monkeypatch.setattr(files, "tensors", lambda file, error: computed.append(file) or tensors(file, error))
    first = fingerprint.of_directory(directory)
    assert fingerprint.of_directory(directory) == first and len(computed) == 1
    (directory / FILE).touch()
    assert fingerprint.of_directory(directory) == first and len(computed) == 2
    (home / "fingerprints.json").write_text("damaged")
    assert fingerprint.of_directory(directory) == first and len(computed) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no weights"),
        (b"", "not a readable safetensors file"),
        (struct.pack("<Q", 1 << 60) + b"{}", "not a readable safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "not a readable safetensors file"),
        (struct.pack("<Q", 61) + b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0,36]}}', "ends before"),
    ],
)
def test_damaged_weights_have_none(directory: Path, content: bytes | None, message: str) -> None:
    (directory / FILE).unlink()
    if content is not None:
        (directory / FILE).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        fingerprint.of_directory(directory)


def test_tokenizer_and_template_have_fingerprints_of_their_own(directory: Path, tmp_path: Path) -> None:
    class Tokenizer:
        chat_template: str | None = TEMPLATE

    before = fingerprint.of_tokenizer(directory), fingerprint.of_template(ChatFormat(Tokenizer()))
    write_tokenizer(directory, template=TEMPLATE + " ")
    assert fingerprint.of_tokenizer(directory) == before[0], "a template is no part of the tokenizer"
    (directory / "tokenizer.json").write_text("{}")
    assert fingerprint.of_tokenizer(directory) != before[0]
    Tokenizer.chat_template = TEMPLATE + " "
    assert fingerprint.of_template(ChatFormat(Tokenizer())) != before[1]
    Tokenizer.chat_template = None
    assert fingerprint.of_template(ChatFormat(Tokenizer())) is None
