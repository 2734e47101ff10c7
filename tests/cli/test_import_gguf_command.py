"""`import-gguf` says what changed and what it left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind

from tests.cli.conftest import Ran
from tests.models.tiny_gguf import tiny_config, write_tiny

Run = Callable[..., Ran]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    kind = Kind.TQ1_0  # a type without a form in MLX that gguf itself can write
    config = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 128}
    return write_tiny(
        tmp_path / "base.gguf", "qwen3", tiny_config("qwen3") | config, changed={"quantize.imatrix.file": "x"},
        kind=lambda name: kind if ".ffn_" in name else Kind.Q8_0,
    )  # fmt: skip


def test_changes_and_what_was_left_out_are_said(file: Path, run: Run, tmp_path: Path) -> None:
    done = run("import-gguf", file, tmp_path / "out")
    assert done.code == 0, done.err
    assert "relative error by type of tensor: F32" in done.err
    assert "left out metadata that is not known: quantize.imatrix.file" in done.err
    assert "6 of TQ1_0" in done.err and "--pack 6" in done.err


def test_pack_quantizes_again(file: Path, run: Run, tmp_path: Path) -> None:
    done = run("import-gguf", file, tmp_path / "out", "--pack", 4, "--json")
    assert done.code == 0 and done.json["quantization"]["bits"] == 8
    assert done.json["notes"] == ["left out metadata that is not known: quantize.imatrix.file"]
    refused = run("import-gguf", file, tmp_path / "other", "--pack", 7)
    assert refused.code == 1 and "known: 2, 3, 4, 5, 6, 8" in refused.err and not (tmp_path / "other").exists()
