"""φ and the amplification factor: against their definitions on whole matrices, and the pictures made of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError, MlxLoraError
from mlx_lora.quant.quantize import dequantize_layer
from mlx_lora.store.adapter import Manifest, StoredAdapter
from mlx_lora.study.subspace import Overlap, amplification, directions, draw, mean, similarity, subspaces

RANDOM = np.random.default_rng(3)
PATHS = [f"model.layers.{layer}.self_attn.{name}" for layer in range(3) for name in ("q_proj", "v_proj")]


def adapter(name: str, paths: list[str], *, rank: int, method: str = "lora", inputs: int = 64, outputs: int = 48,
            arrays: dict[str, Any] | None = None, **settings: Any) -> StoredAdapter:  # fmt: skip
    config = Adapter(method=method, rank=rank, **settings)
    drawn: dict[str, mx.array] = {}
    for path in paths:
        for key, shape in (("lora_a", (inputs, rank)), ("lora_b", (rank, outputs))):
            drawn[f"{path}.{key}"] = mx.array(RANDOM.standard_normal(shape).astype(np.float32)).astype(mx.bfloat16)
    drawn |= {key: mx.array(np.asarray(value, np.float32)) for key, value in (arrays or {}).items()}
    manifest = Manifest(method=method, adapter=config.model_dump(), modules=paths, scales=dict.fromkeys(paths, 2.0))
    return StoredAdapter(Path(name), manifest, drawn)


def numpy_phi(first: Any, second: Any) -> Any:
    """φ by its definition, one i and j after the other; A is (r, in)."""
    u, v = (np.linalg.svd(matrix)[2].T for matrix in (first, second))
    return np.array(
        [
            [np.linalg.norm(u[:, :i].T @ v[:, :j]) ** 2 / min(i, j) for j in range(1, len(second) + 1)]
            for i in range(1, len(first) + 1)
        ]
    )


def float64(array: mx.array) -> Any:
    return np.array(array.astype(mx.float32), np.float64)


@pytest.mark.parametrize("ranks", [(4, 4), (2, 7), (8, 3)])
@pytest.mark.parametrize("of", ["a", "b"])
def test_phi_equals_numpy_for_every_i_and_j(ranks: tuple[int, int], of: str) -> None:
    one, two = (adapter(name, PATHS, rank=rank) for name, rank in zip(("one", "two"), ranks, strict=True))
    overlaps = subspaces(one, two, of=of)
    assert [overlap.module for overlap in overlaps] == PATHS
    for overlap in overlaps:
        factors = [float64(part.arrays[f"{overlap.module}.lora_{of}"]) for part in (one, two)]
        turned = [factor.T for factor in factors] if of == "a" else [factor.T.T for factor in factors]
        np.testing.assert_allclose(overlap.phi, numpy_phi(*turned), atol=1e-5)
        assert overlap.phi.shape == overlap.random_phi.shape == ranks


def test_an_adapter_shares_everything_with_itself() -> None:
    one = adapter("one", PATHS, rank=5)
    for overlap in subspaces(one, one):
        np.testing.assert_allclose(np.diag(overlap.phi), 1, atol=1e-9)
        assert np.diag(overlap.random_phi)[0] < 0.3


def test_spaces_that_share_one_direction_and_spaces_that_share_none() -> None:
    axes = np.eye(8)
    np.testing.assert_allclose(similarity(axes[:, :2], axes[:, 1:3]), [[0, 0], [1, 0.5]], atol=1e-12)
    assert similarity(axes[:, :3], axes[:, 3:6]).max() == 0


def test_the_control_is_that_of_random_spaces_and_comes_again() -> None:
    """Two random spaces of i and j dimensions out of n share max(i, j) / n in the mean."""
    one, two = (adapter(name, PATHS, rank=4, inputs=400) for name in ("one", "two"))
    first, again, other = (subspaces(one, two, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first[0].random_phi, again[0].random_phi)
    assert not np.array_equal(first[0].random_phi, other[0].random_phi)
    assert not np.array_equal(first[0].random_phi, first[1].random_phi)
    for values in mean(first):  # random factors are a control of the control
        assert values[3, 3] == pytest.approx(4 / 400, rel=0.5)


def test_padding_is_no_direction() -> None:
    """The module's own rank is 2, in a file of rank 4."""
    one = adapter("one", PATHS, rank=4, rank_pattern={"v_proj": 2})
    shapes = {overlap.module.rpartition(".")[2]: overlap.phi.shape for overlap in subspaces(one, one)}
    assert shapes == {"q_proj": (4, 4), "v_proj": (2, 2)}
    assert mean(subspaces(one, one))[0].shape == (2, 2)


def test_the_vectors_of_adalora_and_of_differences_are_those_of_the_update() -> None:
    path = PATHS[0]
    strengths = {f"{path}.lora_e": [0.1, 5.0, 1.0]}
    ada = adapter("ada", [path], rank=3, method="adalora", arrays=strengths)
    pissa = adapter("pissa", [path], rank=4)
    pissa.manifest.recipe = {"adapter": {"init": "pissa"}}
    for stored, middle in ((ada, np.diag(strengths[f"{path}.lora_e"])), (pissa, np.eye(4))):
        a, b = (float64(stored.arrays[f"{path}.lora_{factor}"]) for factor in "ab")
        u, _, vt = np.linalg.svd(a @ middle @ b)
        for of, expected in (("a", u), ("b", vt.T)):
            (found,) = directions(stored, path, of)
            np.testing.assert_allclose(np.abs(np.diag(found.T @ expected[:, : found.shape[1]])), 1, atol=1e-9)


def test_experts_are_averaged() -> None:
    path = "model.layers.0.mlp.switch_mlp.up_proj"
    arrays = {
        f"{path}.lora_a": RANDOM.standard_normal((3, 2, 16)),
        f"{path}.lora_b": RANDOM.standard_normal((3, 12, 2)),
    }
    one = adapter("one", [path], rank=2, arrays=arrays)
    changed = {
        key: np.concatenate([value[:2], RANDOM.standard_normal(value[2:].shape)]) for key, value in arrays.items()
    }
    two = adapter("two", [path], rank=2, arrays=changed)
    (overlap,) = subspaces(one, two)
    third = numpy_phi(*(float64(part.arrays[f"{path}.lora_a"])[2] for part in (one, two)))
    assert overlap.phi[0, 0] == pytest.approx((2 + third[0, 0]) / 3, abs=1e-5)
    layer = SwitchLinear(16, 12, 3, bias=False)
    weights, products = (
        float64(layer.weight),
        [2 * b @ a for a, b in zip(*(float64(one.arrays[f"{path}.lora_{f}"]) for f in "ab"), strict=True)],
    )
    expected = np.mean([dense_amplification(d, w, 2) for d, w in zip(products, weights, strict=True)])
    assert amplification(one, path, layer) == pytest.approx(expected, rel=1e-6)


def dense_amplification(delta: Any, weight: Any, rank: int) -> float:
    """Both matrices (out, in): ‖ΔW‖ / ‖Uᵀ W Vᵀ‖ with numpy's SVD of the whole ΔW."""
    u, _, vt = np.linalg.svd(delta)
    return float(np.linalg.norm(delta) / np.linalg.norm(u[:, :rank].T @ weight @ vt[:rank].T))


@pytest.mark.parametrize("kind", ["linear", "4-bit", "embedding", "pooled"])
def test_amplification_equals_numpy_on_the_whole_update(kind: str) -> None:
    path = PATHS[0]
    stored = adapter(
        "one", [path], rank=3, inputs=64 if kind != "pooled" else 2, method="qalora" if kind == "pooled" else "lora"
    )
    layer: nn.Module = nn.Embedding(64, 48) if kind == "embedding" else nn.Linear(64, 48, bias=False)
    if kind == "4-bit":
        layer = layer.to_quantized(group_size=32, bits=4)
    a, b = (float64(stored.arrays[f"{path}.lora_{factor}"]) for factor in "ab")
    if kind == "pooled":  # QA-LoRA: every group of inputs enters as its mean
        a = np.repeat(a, 32, axis=0) / 32
    delta = 2 * a @ b if kind == "embedding" else (2 * a @ b).T
    expected = dense_amplification(
        delta, float64(dequantize_layer(layer, mx.float32)), min(3, 2 if kind == "pooled" else 3)
    )
    assert amplification(stored, path, layer) == pytest.approx(expected, rel=1e-6)


def test_an_update_of_nothing_amplifies_nothing() -> None:
    path = PATHS[0]
    stored = adapter("new", [path], rank=2, arrays={f"{path}.lora_b": np.zeros((2, 48))})
    assert amplification(stored, path, nn.Linear(64, 48)) is None


def test_what_can_not_be_compared_is_refused() -> None:
    one, narrow = adapter("one", PATHS, rank=4), adapter("narrow", PATHS, rank=4, inputs=32)
    with pytest.raises(AdapterError, match="one and narrow share no module of the same shape"):
        subspaces(one, narrow)
    vera = adapter("vera", PATHS, rank=4, method="vera")
    with pytest.raises(AdapterError, match="method vera, which has no two factors") as caught:
        subspaces(one, vera)
    assert caught.value.hint == "methods that have: lora, dora, qalora, adalora"
    dora = adapter("dora", PATHS, rank=4, method="dora")
    assert subspaces(one, dora), "its directions are as good as any"
    with pytest.raises(AdapterError, match="DoRA rescales the whole weight"):
        subspaces(one, dora, model=nn.Linear(2, 2))


@pytest.mark.real
def test_a_picture_is_drawn_of_any_ranks_layers_and_names(tmp_path: Path) -> None:
    """Warnings are errors here: a name that no font can draw would show."""
    from matplotlib.image import imread

    cases = {
        "many": (adapter("$x$", PATHS, rank=9), adapter("二", PATHS, rank=4)),
        "one layer": (adapter("a", PATHS[:1], rank=1), adapter("b", PATHS[:1], rank=1)),
        "no layer": (
            adapter("a", ["model.embed_tokens", *PATHS], rank=2),
            adapter("b", ["model.embed_tokens"], rank=2),
        ),
    }
    for name, pair in cases.items():
        out = tmp_path / f"{name}.png"
        draw(subspaces(*pair), (pair[0].name, pair[1].name), out)
        height, width, _ = imread(out).shape
        assert width > 500 and height > 300, name
        assert len(np.unique(imread(out).round(2))) > 50, f"{name}: an empty picture"


def test_a_picture_that_can_not_be_is_refused_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlaps = [Overlap(PATHS[0], np.ones((2, 2)), np.zeros((2, 2)))]
    for out, said in ((tmp_path / "a.pdf", "are PNG"), (tmp_path / "none" / "a.png", "there is no directory")):
        with pytest.raises(MlxLoraError, match=said):
            draw(overlaps, ("a", "b"), out)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MlxLoraError, match="heat maps need matplotlib") as caught:
        draw(overlaps, ("a", "b"), tmp_path / "a.png")
    assert caught.value.hint == "pip install 'mlx-lora[plots]'"
    assert list(tmp_path.iterdir()) == []
