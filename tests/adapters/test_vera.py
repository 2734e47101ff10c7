"""VeRA's own promises: one frozen pair for all layers, drawn from a seed, and nothing of it trained or stored."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora.adapters.vera import D_INITIAL, VeRA
from mlx_lora.config import Adapter
from mlx_lora.models import SwitchLinear

RANK = 5
LAYERS: dict[str, nn.Module] = {
    "tall": nn.Linear(24, 96), "wide": nn.Linear(64, 16).to_quantized(group_size=32, bits=4),
    "experts": SwitchLinear(32, 40, 3),
}  # fmt: skip
CONFIG = Adapter(method="vera", rank=RANK)


def wrapped(config: Adapter = CONFIG) -> dict[str, VeRA]:
    pair = VeRA.shared(LAYERS, config)
    key = mx.random.key(0)
    return {
        path: VeRA.from_base(layer, config, path=path, key=key, shared=pair) for path, layer in LAYERS.items()
    }  # fmt: skip


def test_all_layers_use_their_part_of_one_pair_as_large_as_the_largest() -> None:
    a, b = (np.array(array) for array in VeRA.shared(LAYERS, CONFIG))
    assert a.shape == (64, RANK) and b.shape == (96, RANK)
    for path, (outputs, inputs) in {"tall": (96, 24), "wide": (16, 64), "experts": (40, 32)}.items():
        its_a, its_b = wrapped()[path].projections()
        np.testing.assert_array_equal(its_a, a[:inputs])
        np.testing.assert_array_equal(its_b, b[:outputs])


def test_the_pair_is_uniform_within_kaimings_bound() -> None:
    a, b = (np.array(array) for array in VeRA.shared({"large": nn.Linear(600, 800)}, Adapter(method="vera", rank=100)))
    for array, fan_in in ((a, 600), (b, 100)):
        bound = (6 / fan_in) ** 0.5
        assert 0.99 * bound < np.abs(array).max() <= bound
        assert np.std(array) == pytest.approx(bound / 3**0.5, rel=0.02)
        assert np.mean(array) == pytest.approx(0, abs=0.02 * bound)


def test_the_seed_and_the_largest_dimensions_decide_the_pair() -> None:
    """An adapter on disk has only the vectors: loading it must draw the same numbers again, in whatever order."""
    first = VeRA.shared(LAYERS, CONFIG)
    again = VeRA.shared(dict(reversed(LAYERS.items())), CONFIG)
    other = VeRA.shared(LAYERS, Adapter(method="vera", rank=RANK, projection_seed=1))
    for one, same, another in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(one, same)
        assert not np.array_equal(one, another)
    assert not np.allclose(first[0][:RANK], first[1][:RANK]), "A and B are one draw"


def test_only_the_two_vectors_are_parameters() -> None:
    for wrapper in wrapped().values():
        wrapper.base.freeze()
        arrays = dict(tree_flatten(wrapper.trainable_parameters()))
        assert sorted(arrays) == sorted(wrapper.adapter_params()) == sorted(VeRA.PRECISE)
        assert not arrays["vera_b"].any().item()
        np.testing.assert_array_equal(arrays["vera_d"], np.full(arrays["vera_d"].shape, D_INITIAL, np.float32))
        assert len(tree_flatten(wrapper.parameters())) == 2 + len(tree_flatten(wrapper.base.parameters()))


def test_the_update_is_the_product_of_the_formula() -> None:
    for path, wrapper in wrapped().items():
        shapes = [wrapper[name].shape for name in ("vera_b", "vera_d")]
        draws = [mx.random.normal(shape, key=mx.random.key(index)) for index, shape in enumerate(shapes)]
        wrapper.vera_b, wrapper.vera_d = draws
        a, b, vector_b, vector_d = (np.array(array, np.float64) for array in (*wrapper.projections(), *draws))
        if path == "experts":
            expected = np.stack([np.diag(vector_b[e]) @ b @ np.diag(vector_d[e]) @ a.T for e in range(3)])
        else:
            expected = np.diag(vector_b) @ b @ np.diag(vector_d) @ a.T
        np.testing.assert_allclose(wrapper.delta(), expected, rtol=1e-4, atol=1e-5)


def test_a_gradient_step_leaves_the_pair_alone() -> None:
    wrapper = wrapped()["tall"]
    wrapper.base.freeze()
    before = [np.array(array) for array in wrapper.projections()]
    x = mx.random.normal((4, 24))
    _, gradients = nn.value_and_grad(wrapper, lambda: (wrapper(x) - 1).square().sum())()
    wrapper.update({name: wrapper[name] - 0.1 * gradients[name] for name in wrapper.adapter_params()})
    assert wrapper.vera_b.any().item()
    for array, same in zip(wrapper.projections(), before, strict=True):
        np.testing.assert_array_equal(array, same)


def test_embeddings_are_refused_with_what_works() -> None:
    assert VeRA.refusal(nn.Embedding(8, 4), CONFIG, "embed") == (
        "VeRA is for linear layers, and embed is of type Embedding; method lora works"
    )
    assert all(VeRA.refusal(layer, CONFIG, path) is None for path, layer in LAYERS.items())
