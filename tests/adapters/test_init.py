"""Starts of LoRA's factors: against numpy's decompositions, exact at the start, and stored for any reader of LoRA."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest

from mlx_lora.adapters import init
from mlx_lora.adapters.attach import Wrappers, attach, build, detach, put
from mlx_lora.adapters.targets import adaptable
from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError
from mlx_lora.models import SwitchLinear
from mlx_lora.models.load import LoadedModel
from mlx_lora.quant.quantize import dequantize_layer, quantize
from mlx_lora.store.adapter import Manifest, read, save, wrappers_for

RANK, ALPHA = 4, 8
SCALE = ALPHA / RANK
TOKENS = mx.array([[5, 17, 3, 80, 41, 2, 9], [1, 1, 60, 7, 22, 90, 13]])


def weight_of(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(1))


def layer_of(kind: str) -> nn.Module:
    layer: nn.Module
    if "embedding" in kind:
        layer = nn.Embedding(1, 1)
        layer.weight = weight_of(96, 64)
    elif "experts" in kind:
        layer = SwitchLinear(1, 1, 1, bias=False)
        layer.weight = weight_of(3, 32, 64)
    else:
        layer = nn.Linear(1, 1, bias=False)
        layer.weight = weight_of(*((96, 64) if "tall" in kind else (32, 64)))
    layer.freeze()
    return layer.to_quantized(group_size=32, bits=4) if "4 bits" in kind else layer


KINDS = ["wide linear", "tall linear", "linear 4 bits", "embedding", "experts", "experts 4 bits"]


def wrap(layer: nn.Module, name: str) -> init.Any:
    from mlx_lora.adapters.lora import LoRA

    config = Adapter(rank=RANK, alpha=ALPHA, init=name)
    return LoRA.from_base(layer, config, path="layer", key=mx.random.key(3))


def run(module: nn.Module, kind: str) -> mx.array:
    if "embedding" in kind:
        return module(TOKENS)
    x = weight_of(2, 5, 64)
    return module(x[..., None, None, :], mx.array([[[0, 2]] * 5, [[1, 1]] * 5])) if "experts" in kind else module(x)


def product(wrapper: init.Any, kind: str) -> np.ndarray:
    """lora_a and lora_b multiplied, in the weight's orientation, without the scale."""
    a, b = np.array(wrapper.lora_a, np.float64), np.array(wrapper.lora_b, np.float64)
    return b @ a if "experts" in kind else a @ b if "embedding" in kind else (a @ b).T


@pytest.mark.parametrize("kind", KINDS)
def test_pissa_begins_at_the_best_approximation_of_the_weight(kind: str) -> None:
    layer = layer_of(kind)
    u, s, v = np.linalg.svd(np.array(dequantize_layer(layer, mx.float32), np.float64), full_matrices=False)
    best = (u[..., :RANK] * s[..., None, :RANK]) @ v[..., :RANK, :]
    wrapper = wrap(layer, "pissa")
    np.testing.assert_allclose(SCALE * product(wrapper, kind), best, atol=1e-4)
    axes = (-1, -2) if "experts" in kind else (0, 1)
    for array, axis in zip((wrapper.lora_a, wrapper.lora_b), axes, strict=True):
        norms = np.linalg.norm(array, axis=axis)
        np.testing.assert_allclose(norms, np.sqrt(s[..., :RANK] / SCALE), rtol=1e-4, err_msg="√S belongs in each")


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (2, 9, 6)], ids=str)
def test_nan_gives_nan_and_never_reaches_the_decomposition(shape: tuple[int, ...]) -> None:
    """MLX's CPU backend counts an SVD that failed as running, and waits for it for ever when memory is at its limit."""
    matrix = weight_of(*shape)
    whole = init.thin_svd(matrix)[1]
    matrix[..., 3, 4] = mx.nan
    for _ in range(10):  # MLX counts every tenth operation
        assert mx.isnan(init.thin_svd(matrix)[1]).all().item()
    limit = mx.set_memory_limit(0)
    try:
        assert mx.isfinite(whole).all().item()
        x = matrix
        for _ in range(100):  # enough to wait for one
            x = mx.sin(x)
        mx.eval(x)
    finally:
        mx.set_memory_limit(limit)


@pytest.mark.parametrize("kind", KINDS)
def test_olora_begins_at_the_first_of_q_and_r(kind: str) -> None:
    layer = layer_of(kind)
    q, r = np.linalg.qr(np.array(dequantize_layer(layer, mx.float32)))
    wrapper = wrap(layer, "olora")
    a, b = np.array(wrapper.lora_a), np.array(wrapper.lora_b)
    left, right = (b, a) if "experts" in kind else (a, b) if "embedding" in kind else (b.T, a.T)
    np.testing.assert_allclose(left, q[..., :RANK], atol=1e-5)  # signs included
    np.testing.assert_allclose(right, r[..., :RANK, :], atol=1e-4)


@pytest.mark.parametrize("name", init.FROM_WEIGHT)
@pytest.mark.parametrize("kind", KINDS)
def test_the_residual_is_implicit(kind: str, name: str) -> None:
    """No bit differs at the start; later the update is s(BA − B₀A₀), and two factors of rank 2r hold it."""
    layer = layer_of(kind)
    before = np.array(run(layer, kind))
    wrapper = wrap(layer, name)
    np.testing.assert_array_equal(run(wrapper, kind), before)
    assert set(wrapper.trainable_parameters()) - {"linear", "embedding", "dropout"} == {"lora_a", "lora_b"}
    start = product(wrapper, kind)
    for key in ("lora_a", "lora_b"):
        wrapper[key] = wrapper[key] + 0.01 * mx.random.normal(wrapper[key].shape, key=mx.random.key(5))
    np.testing.assert_allclose(wrapper.delta(), SCALE * (product(wrapper, kind) - start), atol=1e-4)
    np.testing.assert_allclose(run(wrapper, kind), run(wrapper.fuse(), kind), rtol=1e-4, atol=1e-3)
    stored = wrapper.stored_arrays()
    assert {key: array.size for key, array in stored.items()} == {
        key: 2 * wrapper[key].size for key in ("lora_a", "lora_b")
    }
    plain = wrap(layer, "default")
    plain.lora_a, plain.lora_b = stored["lora_a"], stored["lora_b"]
    np.testing.assert_array_equal(run(plain, kind), run(wrapper, kind))


def train_a_little(model: nn.Module, wrappers: Wrappers, steps: int = 3) -> None:
    optimizer = optimizers.Adam(1e-5)
    loss = nn.value_and_grad(model, lambda: nn.losses.cross_entropy(model(TOKENS)[:, :-1], TOKENS[:, 1:]).mean())
    for _ in range(steps):
        _, gradients = loss()
        optimizer.update(model, gradients)
        mx.eval(model.state, optimizer.state)


@pytest.mark.parametrize("name", init.FROM_WEIGHT)
def test_what_was_learned_survives_its_rounding_on_disk(tiny: LoadedModel, tmp_path: Path, name: str) -> None:
    """Stored as [A, A₀] and [B; −B₀] it would not: bf16 rounds A₀ by more than a short training moves it."""
    settings = Adapter(rank=RANK, alpha=ALPHA, init=name)
    bare = tiny.model(TOKENS)
    wrappers = attach(tiny.model, settings)
    train_a_little(tiny.model, wrappers)
    learned = tiny.model(TOKENS)
    manifest = Manifest(
        method="lora", adapter=settings.model_dump(), modules=list(wrappers), scales=dict.fromkeys(wrappers, SCALE)
    )
    stored = read(save(tmp_path / "adapter", wrappers, manifest, layers=3))
    assert stored.rank == 2 * RANK and stored.scale == SCALE
    put(tiny.model, wrappers_for(tiny.model, stored))
    moved, off = mx.abs(learned - bare).max().item(), mx.abs(tiny.model(TOKENS) - learned).max().item()
    assert moved > 1e-3 and off < 0.02 * moved


@pytest.mark.parametrize("name", init.FROM_WEIGHT)
def test_a_start_from_the_weight_trains_under_compile(tiny: LoadedModel, name: str) -> None:
    """A and A₀ are one array at the start: compiled, they must come apart."""
    wrappers = attach(tiny.model, Adapter(rank=RANK, alpha=ALPHA, init=name))
    first = {path: np.array(wrapper.first_a) for path, wrapper in wrappers.items()}
    optimizer = optimizers.Adam(1e-3)
    loss = nn.value_and_grad(tiny.model, lambda: nn.losses.cross_entropy(tiny.model(TOKENS), TOKENS).mean())
    optimizer.init(tiny.model.trainable_parameters())
    state = [tiny.model.state, optimizer.state]

    def step() -> mx.array:
        value, gradients = loss()
        optimizer.update(tiny.model, gradients)
        return value

    compiled = mx.compile(step, inputs=state, outputs=state)
    losses = []
    for _ in range(4):
        losses.append(compiled().item())
        mx.eval(state)
    assert losses[-1] < losses[0] - 0.01
    for path, wrapper in wrappers.items():
        np.testing.assert_array_equal(wrapper.first_a, first[path])
        assert not np.array_equal(wrapper.lora_a, first[path])


def test_loftq_comes_closer_to_the_weights_before_packing(tiny: LoadedModel) -> None:
    originals = {path: layer["weight"] for path, layer in adaptable(tiny.model).items()}
    quantize(tiny.model, {"mode": "affine", "bits": 2, "group_size": 32})
    wrappers = attach(tiny.model, Adapter(rank=8, alpha=ALPHA, init="loftq"))
    assert not any(wrapper.lora_b.any().item() for wrapper in wrappers.values())
    kept = dict(originals)
    init.loftq(wrappers, kept)
    assert not kept.keys() & wrappers.keys(), "an original stays in memory"
    for path, wrapper in wrappers.items():
        lost = np.array(originals[path], np.float64) - np.array(dequantize_layer(wrapper.base, mx.float32))
        left = np.linalg.norm(lost - np.array(wrapper.delta()))
        s = np.linalg.svd(lost, compute_uv=False)
        assert left == pytest.approx(np.linalg.norm(s[8:]), rel=1e-4) and left < 0.95 * np.linalg.norm(lost)


def test_loftq_needs_a_packed_layer(tiny: LoadedModel) -> None:
    with pytest.raises(AdapterError, match=r"q_proj isn't packed; quantize: in the recipe packs it"):
        build(tiny.model, Adapter(rank=RANK, init="loftq", targets=["q_proj"]))


def batches() -> Iterator[tuple[mx.array, mx.array]]:
    generator = np.random.default_rng(0)
    for _ in range(3):
        yield mx.array(generator.integers(0, 200, (3, 20)).astype(np.int32)), mx.array(np.arange(3, 60, 2))


def entering(model: nn.Module, wanted: str) -> np.ndarray:
    """All rows that enter one linear in those batches."""
    seen: list[np.ndarray] = []
    layer = adaptable(model)[wanted]
    init.set_modules(model, {wanted: init._Recorder(layer, lambda x: seen.append(np.array(x)))})
    places = []
    for tokens, positions in batches():
        mx.eval(model(tokens))
        places.append(np.array(positions))
    init.set_modules(model, {wanted: layer})
    return np.concatenate([x.reshape(-1, x.shape[-1])[here] for x, here in zip(seen, places, strict=True)])


def test_eva_begins_at_the_directions_of_what_enters(tiny: LoadedModel) -> None:
    config = Adapter(rank=RANK, alpha=ALPHA, init="eva", targets="all-linear")
    bare = np.array(tiny.model(TOKENS))
    layers = {path: wrapper.base for path, wrapper in build(tiny.model, config).items()}
    settings, directions = init.eva(tiny.model, layers, config, batches())
    assert all(adaptable(tiny.model)[path] is layer for path, layer in layers.items()), "a recorder stayed"
    wrappers = attach(tiny.model, settings)
    for path, a in directions.items():
        assert a.shape == wrappers[path].lora_a.shape
        wrappers[path].lora_a = a
        assert wrappers[path].scale == pytest.approx(SCALE)
        np.testing.assert_allclose(a.T @ a, np.eye(a.shape[1]), atol=1e-4)
    np.testing.assert_array_equal(tiny.model(TOKENS), bare)
    detach(tiny.model)

    ranks = [settings.rank_of(path) for path in layers]
    assert sum(ranks) == RANK * len(layers) and 1 <= min(ranks) < RANK < max(ranks) <= 2 * RANK
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        rows = entering(tiny.model, path)
        _, s, v = np.linalg.svd(rows.astype(np.float64), full_matrices=False)
        rank = settings.rank_of(path)
        overlap = np.linalg.norm(v[:rank] @ np.array(directions[path])) ** 2 / rank
        assert overlap > 0.99, f"{path}: {overlap}"
        gaps = s[:rank] / s[1 : rank + 1] > 1.2
        np.testing.assert_allclose(np.abs((v[:rank] * np.array(directions[path]).T).sum(1))[gaps], 1, atol=0.02)

    again, same = init.eva(tiny.model, layers, config, batches())
    assert again == settings and all(mx.array_equal(same[path], a) for path, a in directions.items())


def test_eva_names_the_layer_that_something_not_finite_enters(tiny: LoadedModel) -> None:
    config = Adapter(rank=RANK, init="eva", targets="all-linear")
    layers = {path: wrapper.base for path, wrapper in build(tiny.model, config).items()}
    layer = layers["model.layers.0.self_attn.o_proj"]
    layer.weight = mx.where(mx.arange(layer.weight.size).reshape(layer.weight.shape) == 7, mx.nan, layer.weight)
    with pytest.raises(FloatingPointError, match=r"^what enters model\.layers\.0\.mlp\.(gate|up)_proj isn't finite$"):
        init.eva(tiny.model, layers, config, batches())


def test_eva_keeps_the_settings_of_other_modules_and_rslora() -> None:
    config = Adapter(rank=4, alpha=8, rslora=True, init="eva", rank_pattern={"v_proj": 6})
    changed = config.with_ranks({"a.q_proj": 9})
    assert changed.rank_of("a.q_proj") == 9 and changed.rank_of("a.v_proj") == 6
    assert changed.scale_of("a.q_proj") == pytest.approx(config.scale_of("a.q_proj"))
    assert all(re.compile(key) for key in changed.rank_pattern)


def test_ranks_go_where_directions_explain_most() -> None:
    shares = {"a": [0.9, 0.05, 0.01], "b": [0.4, 0.3, 0.2], "c": [0.5, 0.1, 0.1]}
    assert init.redistribute(shares, 6) == {"a": 1, "b": 3, "c": 2}
    assert init.redistribute(shares, 2) == {"a": 1, "b": 1, "c": 1}
    assert init.redistribute(shares, 99) == {"a": 3, "b": 3, "c": 3}


def test_eva_needs_activations(tiny: LoadedModel) -> None:
    with pytest.raises(AdapterError, match=r"embed_tokens is a Embedding.*pissa"):
        build(tiny.model, Adapter(rank=RANK, init="eva", targets=["embed_tokens"]))
