"""What NF4 and MLX's affine mode cost a real model at about the same bits: perplexity and KL, whoever wins."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_lora.config import Data, Quantize
from mlx_lora.data.prepare import prepare
from mlx_lora.measure import as_dict, compare
from mlx_lora.models.load import load, load_stored, ready
from mlx_lora.quant.quantize import quantize

pytestmark = pytest.mark.real

ROWS = 12
# In the order of their bits; this model's 576 columns have no groups of 128.
SETTINGS = (
    Quantize(mode="nf4", double_quant=True),
    Quantize(mode="nf4", group_size=32, double_quant=True),
    Quantize(mode="nf4"),
    Quantize(group_size=64),
    Quantize(mode="nf4", group_size=32),
    Quantize(group_size=32),
)


def test_perplexity_beside_mlxs_affine_mode(smollm2: Path, wikisql: Path, tmp_path: Path) -> None:
    """The model was published in 4 bits, affine in blocks of 32: what is nearest to those has an advantage."""
    read = [json.loads(line) for line in (wikisql / "valid.jsonl").read_text().splitlines()[:ROWS]]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": row["prompt"] + row["completion"]}) + "\n" for row in read))
    base = load(smollm2)
    rows = prepare(file, Data(valid_fraction=0), base.tokenizer).train
    assert len(rows) == ROWS
    bits, kl = {}, {}
    for settings in SETTINGS:
        packed = load_stored(smollm2)
        packed.model.set_dtype(mx.float16)  # as models are published: affine scales are halves then
        report = quantize(packed.model, settings.complete())
        assert not report.left_alone
        found = as_dict(compare(base.model, ready(packed).model, rows))
        name = f"{settings.mode} {settings.group_size or 64}{' double' if settings.double_quant else ''}"
        bits[name], kl[name] = report.bits_per_weight, found["kl"]
        print(
            f"\n{name}: {bits[name]:.3f} bits, error {report.relative_error:.4f}, perplexity "
            f"{found['perplexity_before']:.3f} -> {found['perplexity_after']:.3f}, KL {kl[name]:.4f} nats, "
            f"same top token {found['top1_agreement']:.1%}",
            end="",
        )
    assert bits["nf4 64 double"] == pytest.approx(4.127, abs=0.01)
    assert kl["nf4 64 double"] == pytest.approx(kl["nf4 64"], rel=0.2), "the second level costs next to nothing (§3)"
    assert kl["nf4 32"] < kl["nf4 64"] < 1
