"""Merging by entries equals PEFT's own functions, given whole updates; PEFT applies them to A and B apart."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_lora.store.arithmetic import Entries, MergeSettings

pytestmark = pytest.mark.real


@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.6, 0.6, 0.6]])
def test_entries_equal_pefts(method: str, weights: list[float]) -> None:
    """Equal weights: with others PEFT elects signs before it weighs, so that what is subtracted votes for itself."""
    peft = pytest.importorskip("peft.utils.merge_utils")
    import torch

    generator = np.random.default_rng(0)
    factors = [(generator.standard_normal((40, 4)), generator.standard_normal((4, 30))) for _ in weights]
    wholes = [torch.tensor(a.astype(np.float32) @ b.astype(np.float32)) for a, b in factors]
    theirs = getattr(peft, method)(wholes, torch.tensor(weights), 0.3).numpy()
    terms = [(a, weight * b) for weight, (a, b) in zip(weights, factors, strict=True)]
    ours = np.concatenate(list(Entries(terms, MergeSettings(method, density=0.3), "layer")))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
