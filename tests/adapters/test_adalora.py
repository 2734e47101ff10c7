"""AdaLoRA's layer: triplets, what a pruned one adds, and where it starts."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_lora.adapters.adalora import AdaLoRA
from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError
from mlx_lora.models import SwitchLinear
from mlx_lora.models.load import LoadedModel

OUT, IN, RANK, ALPHA, EXPERTS = 32, 64, 4, 6, 3
CONFIG = Adapter(method="adalora", rank=RANK, alpha=ALPHA)
LAYERS = {
    "linear": lambda: nn.Linear(IN, OUT, bias=False),
    "embedding": lambda: nn.Embedding(OUT, IN),
    "experts": lambda: SwitchLinear(IN, OUT, EXPERTS, bias=False),
}


def wrap(kind: str) -> AdaLoRA:
    wrapper = AdaLoRA.from_base(LAYERS[kind](), CONFIG, path="layer", key=mx.random.key(0))
    wrapper.lora_e = mx.random.normal(wrapper.lora_e.shape, key=mx.random.key(1))
    return wrapper


@pytest.mark.parametrize("kind", LAYERS)
def test_the_update_is_p_lambda_q(kind: str) -> None:
    wrapper = wrap(kind)
    a, e, b = (np.array(wrapper[name], np.float64) for name in ("lora_a", "lora_e", "lora_b"))
    if kind == "experts":
        expected = np.einsum("eor,er,eri->eoi", b, e, a)
    else:
        expected = np.einsum("ir,r,ro->io" if kind == "embedding" else "ir,r,ro->oi", a, e, b)
    np.testing.assert_allclose(wrapper.delta(), ALPHA / RANK * expected, atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_pruned_triplet_adds_nothing(kind: str) -> None:
    wrapper = wrap(kind)
    wrapper.lora_e = mx.where(mx.arange(RANK) < 1, wrapper.lora_e, 0)
    delta = np.array(wrapper.delta())
    assert np.all(np.linalg.matrix_rank(delta) == 1)


def test_it_starts_with_gaussian_vectors_and_no_singular_value() -> None:
    wrapper = AdaLoRA.from_base(nn.Linear(500, 400), CONFIG, path="layer", key=mx.random.key(0))
    assert not wrapper.lora_e.any().item() and wrapper.lora_e.shape == (RANK,)
    for name in ("lora_a", "lora_b"):
        assert np.std(np.array(wrapper[name])) == pytest.approx(0.02, rel=0.1)
    same = AdaLoRA.from_base(nn.Linear(500, 400), CONFIG, path="layer", key=mx.random.key(0))
    np.testing.assert_array_equal(wrapper.lora_b, same.lora_b)


def test_another_start_is_refused(tiny: LoadedModel) -> None:
    from mlx_lora.adapters.attach import attach

    with pytest.raises(AdapterError, match="start of its own; default works"):
        attach(tiny.model, Adapter(method="adalora", init="gaussian"))
