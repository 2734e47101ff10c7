"""LoRA on networks that are no language model: the 100×100 regression of LoRA's introductions, a small denoiser."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_lora
from mlx_lora.errors import AdapterError

SIZE, RANK = 100, 4


def parameters(model: nn.Module) -> int:
    return sum(array.size for _, array in tree_flatten(model.trainable_parameters()))


def fit(model: nn.Module, x: mx.array, y: mx.array, *, steps: int, learning_rate: float) -> float:
    """Mean squared error after some steps of Adam on all of (x, y) at once, its learning rate falling to zero."""
    error = lambda model: nn.losses.mse_loss(model(x), y)  # noqa: E731
    step = nn.value_and_grad(model, error)
    optimizer = optim.Adam(optim.cosine_decay(learning_rate, steps))
    for _ in range(steps):
        _, gradients = step(model)
        optimizer.update(model, gradients)
        mx.eval(model.state, optimizer.state)
    return float(error(model).item())


class Denoiser(nn.Module):
    """Predicts the noise in an image: (n, height, width, 1) -> the same shape."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.enter = nn.Conv2d(1, channels, 3, padding=1)
        self.middle = nn.Conv2d(channels, channels, 3, padding=2, dilation=2)
        self.leave = nn.Conv2d(channels, 1, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        return self.leave(nn.relu(self.middle(nn.relu(self.enter(x)))))


def noisy(seed: int, *, stripes: bool) -> tuple[mx.array, mx.array]:
    """Smooth images with noise, and the noise: independent for every pixel, or one number for each row of pixels."""
    generator = np.random.default_rng(seed)
    phases = generator.uniform(0, 2 * np.pi, (16, 2, 1, 1))
    grid = np.linspace(0, 2 * np.pi, 16)
    clean = np.sin(grid[:, None] + phases[:, 0]) * np.cos(grid[None] + phases[:, 1])
    noise = generator.normal(0, 0.5, (16, 16, 1 if stripes else 16)) * np.ones((16, 16, 16))
    return mx.array((clean + noise)[..., None].astype(np.float32)), mx.array(noise[..., None].astype(np.float32))


def test_the_toy_recovers_a_matrix_as_far_as_rank_4_can() -> None:
    """800 of 10,000 parameters; the error left is that of the best approximation of rank 4 (Eckart and Young)."""
    generator = np.random.default_rng(0)
    start = generator.normal(size=(SIZE, SIZE)) / SIZE**0.5
    directions = [np.linalg.qr(generator.normal(size=(SIZE, SIZE)))[0] for _ in range(2)]
    values = np.zeros(SIZE)
    values[:8] = [8, 6, 5, 4, 0.8, 0.6, 0.4, 0.2]  # rank 8, of which four directions matter most
    wanted = start + directions[0] * values @ directions[1].T
    model = nn.Linear(SIZE, SIZE, bias=False)
    model.weight = mx.array(start.astype(np.float32))
    network = nn.Sequential(model)
    x = mx.array((np.linalg.qr(generator.normal(size=(SIZE, SIZE)))[0] * SIZE**0.5).astype(np.float32))

    mlx_lora.attach(network, rank=RANK, alpha=RANK, targets="all-linear")
    assert parameters(network) == 2 * RANK * SIZE == 800 and model.weight.size == 10_000
    fit(network, x, x @ mx.array(wanted.astype(np.float32)).T, steps=800, learning_rate=0.05)

    learned = np.array(network.layers[0].fuse().weight, dtype=np.float64)
    error, best = np.linalg.norm(wanted - learned), np.linalg.norm(values[RANK:])
    assert (1 - 1e-6) * best <= error < 1.01 * best
    mlx_lora.detach(network)
    assert network.layers[0] is model and np.array_equal(model.weight, start.astype(np.float32))


@pytest.mark.real
def test_a_denoiser_learns_another_noise_in_a_fraction_of_its_parameters() -> None:
    mx.random.seed(0)
    model = Denoiser()
    fit(model, *noisy(0, stripes=False), steps=100, learning_rate=0.01)
    everything = parameters(model)
    before = dict(tree_flatten(model.parameters()))
    x, noise = noisy(1, stripes=True)
    untrained = float(nn.losses.mse_loss(model(x), noise).item())

    mlx_lora.attach(model, rank=2, alpha=4, rank_pattern={"leave": 1}, targets=["enter", "middle", "leave"])
    assert parameters(model) < everything / 2
    assert float(nn.losses.mse_loss(model(x), noise).item()) == untrained
    assert fit(model, x, noise, steps=150, learning_rate=0.02) < 0.8 * untrained

    mlx_lora.detach(model)
    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == before.keys() and all(mx.array_equal(before[path], after[path]) for path in before)
    assert float(nn.losses.mse_loss(model(x), noise).item()) == untrained


CONVOLUTIONS: list[tuple[Any, tuple[int, ...]]] = [
    (lambda: nn.Conv1d(3, 6, 5, stride=2, padding=2), (2, 11, 3)),
    (lambda: nn.Conv1d(3, 6, 3, dilation=2, bias=False), (2, 11, 3)),
    (lambda: nn.Conv2d(3, 6, (3, 5), stride=(2, 1), padding=(1, 2)), (2, 9, 8, 3)),
    (lambda: nn.Conv2d(3, 6, 3, dilation=2), (2, 9, 8, 3)),
]


@pytest.mark.parametrize(("make", "shape"), CONVOLUTIONS, ids=["strided", "dilated", "strided 2d", "dilated 2d"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_a_convolution_with_its_update_merged_computes_the_same(make: Any, shape: Any, dtype: mx.Dtype) -> None:
    mx.random.seed(0)
    layer = make()
    layer.set_dtype(dtype)
    network = nn.Sequential(layer)
    x = mx.random.normal(shape).astype(dtype)
    plain = layer(x)
    mlx_lora.attach(network, rank=2, targets=["0"])
    wrapper = network.layers[0]
    assert mx.array_equal(network(x), plain) and network(x).dtype == dtype
    outputs, *patch = layer.weight.shape
    assert parameters(network) == 2 * (int(np.prod(patch)) + outputs)

    wrapper.lora_b = mx.random.normal(wrapper.lora_b.shape)
    network.set_dtype(mx.float32)
    assert wrapper.delta().shape == layer.weight.shape
    fused = wrapper.fuse()
    assert type(fused) is type(layer) and ("bias" in fused) == ("bias" in layer)
    assert mx.allclose(fused(x.astype(mx.float32)), network(x.astype(mx.float32)), atol=1e-4)
    assert not mx.allclose(network(x.astype(mx.float32)), plain.astype(mx.float32), atol=0.1)


def test_the_update_of_a_convolution_has_the_rank_of_its_patches() -> None:
    """A rank above 3 input channels is fine where there are 27 numbers in a patch; one above the 6 outputs is not."""
    layer = nn.Conv2d(3, 6, 3)
    mlx_lora.attach(network := nn.Sequential(layer), rank=6, targets=["0"])
    wrapper = network.layers[0]
    wrapper.lora_b = mx.random.normal(wrapper.lora_b.shape)
    assert np.linalg.matrix_rank(np.array(wrapper.delta()).reshape(6, -1)) == 6
    with pytest.raises(AdapterError, match="rank is above the smaller dimension"):
        mlx_lora.attach(nn.Sequential(nn.Conv2d(3, 6, 3)), rank=7, targets=["0"])


@pytest.mark.parametrize(
    ("layer", "settings", "reason"),
    [
        (lambda: nn.Conv1d(4, 6, 3, groups=2), {}, "2 groups; one without groups works"),
        (lambda: nn.Conv2d(3, 6, 3), {"init": "pissa"}, "init default works"),
        (lambda: nn.Conv2d(3, 6, 3), {"method": "dora"}, "a Conv2d can't be served by dora; a linear"),
        (lambda: nn.LayerNorm(4), {}, "no module is called '0'"),
    ],
    ids=["groups", "pissa", "dora", "norm"],
)
def test_what_cant_be_served_is_refused_with_what_works(layer: Any, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        mlx_lora.attach(nn.Sequential(layer()), rank=2, targets=["0"], **settings)


def test_all_linear_of_any_network_leaves_convolutions_alone() -> None:
    network = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.ReLU(), nn.Linear(4, 4))
    mlx_lora.attach(network, rank=2, targets="all-linear")
    assert isinstance(network.layers[0], nn.Conv1d) and network.layers[2].base.weight.shape == (4, 4)
    assert parameters(network) == 2 * 8
