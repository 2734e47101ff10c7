"""`quantize` from the command line: what it keeps, names, refuses, and says of its result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_lora import paths
from mlx_lora.config import Quantize
from mlx_lora.models.layers import dequantize_model
from mlx_lora.models.load import load_stored
from mlx_lora.models.save import save
from tests.cli.conftest import Ran
from tests.conftest import write_model

Run = Callable[..., Ran]


@pytest.fixture
def from_4_bits(tmp_path: Path) -> tuple[Path, Path]:
    """A model as `import-gguf` makes it of Q4_0: packed in groups of 32, and the same in plain float16."""
    source = write_model(tmp_path / "source", dtype=mx.float16)
    settings = Quantize(bits=4, group_size=32)
    save(load_stored(source, quantization=settings), tmp_path / "packed")
    plain = load_stored(source, quantization=settings)
    dequantize_model(plain, mx.float16)
    save(plain, tmp_path / "plain")
    return tmp_path / "packed", tmp_path / "plain"


@pytest.mark.real
def test_quantize_of_a_model_that_came_from_4_bits_keeps_its_packing(
    run: Run, from_4_bits: tuple[Path, Path], tmp_path: Path
) -> None:
    """It was packed a second time onto groups of 64: relative error 0.095, and the model was wrecked."""
    for source, error in zip(from_4_bits, (0.0, 5e-4), strict=True):
        ran = run("quantize", source, tmp_path / f"{source.name}-4", "--json")
        assert ran.code == 0 and ran.json["relative_error"] <= error and ran.json["top1_agreement"] > 0.99
        assert ran.json["bits_per_weight"] < 5.2
        assert set(map(str, ran.json["kept"].values())) == {"{'mode': 'affine', 'bits': 4, 'group_size': 32}"}
    wider = run("quantize", from_4_bits[1], tmp_path / "8", "--bits", 8, "--json")
    assert wider.json["bits_per_weight"] < 5.2, "four bits hold it: eight would only be larger"
    narrower = run("quantize", from_4_bits[0], tmp_path / "3", "--bits", 3, "--verify", "none")
    assert narrower.code == 0 and "half precision" in narrower.err and "layers keep" not in narrower.out


def test_quantize_bits_3_group_size_128_is_refused_when_most_weights_stay(
    run: Run, tiny_path: Path, tmp_path: Path
) -> None:
    """13.48 bits a weight, exit code 0."""
    ran = run("quantize", tiny_path, tmp_path / "out", "--bits", 3, "--group-size", 128)
    assert ran.code == 1 and "groups of 128 fit only" in ran.err and "--group-size 32 or 64 fits 100%" in ran.err
    assert not (tmp_path / "out").exists()


def test_quantize_names_layers_that_could_not_be_packed(run: Run, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", intermediate_size=96)
    ran = run("quantize", source, tmp_path / "out", "--group-size", 64, "--json")
    assert ran.code == 0
    assert "not quantized: 3 down_proj: 96 columns can't be divided into groups of 64" in ran.err.replace("\n", " ")
    (group,) = ran.json["unpacked"]
    assert group["layers"] == ran.json["left_alone"] and len(group["layers"]) == 3


def test_quantize_measures_by_default_and_warns_of_a_wreck(run: Run, tmp_path: Path) -> None:
    base = paths.bundled("data", "base")
    good = run("quantize", base, tmp_path / "8", "--bits", 8, "--json")
    assert good.code == 0 and good.json["kl"] < 0.01 and "damaged" not in good.err
    wreck = run("quantize", base, tmp_path / "2", "--bits", 2, "--json")
    assert wreck.code == 0 and wreck.json["kl"] > 0.25 and "the result is damaged" in wreck.err
    unmeasured = run("quantize", base, tmp_path / "4", "--verify", "none", "--json")
    assert unmeasured.code == 0 and "kl" not in unmeasured.json
