"""Two seeds learn a common direction on a real task, where random matrices share none (LoRA paper, §7.2, figure 4)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.real.conftest import Shell

pytestmark = pytest.mark.real


def test_the_top_direction_of_two_seeds_overlaps_more_than_chance(
    shell: Shell, smollm2: Path, wikisql: Path, tmp_path: Path
) -> None:
    """A few steps at a high rate, the last layers only: enough that A is no longer what it was drawn as."""
    for seed in (0, 1):
        shell.json(
            "train", "--model", smollm2, "--data", wikisql / "train.jsonl", "--name", f"seed{seed}", f"seed={seed}",
            "adapter.layers=4", "data.template=none", "data.valid_fraction=0", "train.iters=8",
            "train.batch_size=4", "train.learning_rate=5e-3", "train.schedule=constant",
        )  # fmt: skip
    out = tmp_path / "phi.png"
    report = shell.json("study", "subspace", "seed0", "seed1", "--out", out)
    phi, control = (np.array([module[key] for module in report["modules"]]) for key in ("phi", "random_phi"))
    top, chance = phi[:, 0, 0].mean(), control[:, 0, 0].mean()
    print(f"\nφ(1,1) {top:.3f}, between Gaussian matrices {chance:.4f}; φ(8,8) {phi[:, 7, 7].mean():.3f}")
    assert len(phi) == 4 * 4
    assert top > 10 * chance and top > 0.05
    assert top > phi[:, 7, 7].mean(), "the top direction is shared more than the others"
    assert out.read_bytes().startswith(b"\x89PNG")
