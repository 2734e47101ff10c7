"""Merging adapters: against the same arithmetic on whole matrices, in numpy's float64."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError
from mlx_lora.methods import MERGES
from mlx_lora.store import arithmetic
from mlx_lora.store.adapter import Manifest, StoredAdapter
from mlx_lora.store.arithmetic import (
    Entries,
    Merged,
    MergeSettings,
    factors,
    kth_largest,
    merge,
    nearest_low_rank,
    thin_svd,
)

Q, V, EXPERTS = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.0.mlp.up_proj"
SHAPES: dict[str, tuple[int, ...]] = {Q: (48, 40), V: (48, 24), EXPERTS: (3, 32, 20)}  # inputs and outputs
RANDOM = np.random.default_rng(0)


def adapter(name: str, paths: list[str], *, rank: int, scale: float = 2.0, **settings: Any) -> StoredAdapter:
    """An adapter with bf16 factors that were never on a disk."""
    config = Adapter(rank=rank, alpha=rank * scale, **settings)
    arrays = {}
    for path in paths:
        *experts, inputs, outputs = SHAPES[path]
        pair = RANDOM.standard_normal((*experts, inputs, rank)), RANDOM.standard_normal((*experts, rank, outputs))
        pair = tuple(factor.swapaxes(1, 2) for factor in pair) if experts else pair  # type: ignore[assignment]
        for key, factor in zip(("lora_a", "lora_b"), pair, strict=True):
            arrays[f"{path}.{key}"] = mx.array(factor.astype(np.float32)).astype(mx.bfloat16)
    manifest = Manifest(
        method=config.method, adapter=config.model_dump(), modules=paths, scales=dict.fromkeys(paths, scale)
    )
    return StoredAdapter(Path(name), manifest, arrays)


def product(a: Any, b: Any, *, experts: bool) -> Any:
    """Stored factors multiplied: (in, out), or (E, out, in)."""
    a, b = (np.array(array.astype(mx.float32), np.float64) for array in (a, b))
    return b @ a if experts else a @ b


def delta(stored: StoredAdapter, path: str) -> Any:
    if f"{path}.lora_a" not in stored.arrays:
        return 0.0
    pair = (stored.arrays[f"{path}.lora_{factor}"] for factor in "ab")
    return stored.scale * product(*pair, experts=path == EXPERTS)


def merged_delta(merged: Merged, path: str) -> Any:
    return product(*(merged.stored[path][f"lora_{factor}"] for factor in "ab"), experts=path == EXPERTS)


def distance(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture
def pair() -> tuple[StoredAdapter, StoredAdapter]:
    """Of two ranks and scales, and each with a module that the other doesn't have."""
    return adapter("sql", [Q, V, EXPERTS], rank=4), adapter("mail", [V, EXPERTS], rank=3, scale=0.5)


def dense_best(matrix: Any, rank: int) -> Any:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


@pytest.mark.parametrize("method", ["cat", "linear"])
def test_the_sum_is_exact_in_every_module(pair: tuple[StoredAdapter, StoredAdapter], method: str) -> None:
    sql, mail = pair
    merged = merge([(sql, 0.7), (mail, -1.3)], MergeSettings(method))
    assert list(merged.stored) == [Q, V, EXPERTS] and merged.ranks == {Q: 4, V: 7, EXPERTS: 7}
    for path in SHAPES:
        expected = 0.7 * delta(sql, path) - 1.3 * delta(mail, path)
        assert distance(merged_delta(merged, path), expected) < 1e-6, path
    assert merged.relative_error < 1e-6


def test_linear_has_the_smallest_rank_that_holds_the_sum(pair: tuple[StoredAdapter, StoredAdapter]) -> None:
    sql, mail = pair
    merged = merge([(sql, 1.0), (sql, 0.5), (mail, 1.0), (mail, -1.0)], MergeSettings("linear"))
    assert set(merged.ranks.values()) == {4}, "what is there twice has no directions of its own"
    assert distance(merged_delta(merged, V), 1.5 * delta(sql, V)) < 1e-6


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("method", ["svd", "linear"])
def test_a_lower_rank_is_the_best_there_is(pair: tuple[StoredAdapter, StoredAdapter], method: str, rank: int) -> None:
    sql, mail = pair
    merged = merge([(sql, 1.0), (mail, 2.0)], MergeSettings(method, rank=rank))
    errors = norms = 0.0
    for path in SHAPES:
        whole = delta(sql, path) + 2 * delta(mail, path)
        assert merged.ranks[path] == min(rank, 4 if path == Q else 7)
        assert distance(merged_delta(merged, path), dense_best(whole, rank)) < 1e-5, path
        errors += np.square(whole - dense_best(whole, rank)).sum()
        norms += np.square(whole).sum()
    assert merged.relative_error == pytest.approx(np.sqrt(errors / norms), rel=1e-4, abs=1e-6)


def test_svd_keeps_the_largest_rank_of_its_parents_unless_told(pair: tuple[StoredAdapter, StoredAdapter]) -> None:
    assert merge([(part, 1.0) for part in pair], MergeSettings("svd")).ranks == {Q: 4, V: 4, EXPERTS: 4}


def test_a_tolerance_takes_the_smallest_rank_within_it(pair: tuple[StoredAdapter, StoredAdapter]) -> None:
    sql, mail = pair
    merged = merge([(sql, 1.0), (mail, 1.0)], MergeSettings("svd", tolerance=0.3))
    for path in (Q, V):
        whole = delta(sql, path) + delta(mail, path)
        rank = merged.ranks[path]
        assert distance(dense_best(whole, rank), whole) <= 0.3 < distance(dense_best(whole, rank - 1), whole)
        assert distance(merged_delta(merged, path), whole) <= 0.3
    with pytest.raises(AdapterError, match="rank 1 leaves a relative error of .*tolerance is 0.3"):
        merge([(sql, 1.0), (mail, 1.0)], MergeSettings("svd", rank=1, tolerance=0.3))


def test_nothing_at_all_stays_nothing(pair: tuple[StoredAdapter, StoredAdapter]) -> None:
    for method in MERGES:
        merged = merge([(pair[0], 0.0)], MergeSettings(method))
        assert all(np.abs(merged_delta(merged, path)).max() == 0 for path in SHAPES), method


# --- what works on single entries ---


def pruned(matrix: Any, density: float) -> Any:
    """The largest entries, by sorting all of them."""
    least = np.sort(np.abs(matrix).ravel())[-max(1, round(density * matrix.size))]
    return np.where(np.abs(matrix) >= least, matrix, 0)


def dense_ties(matrices: list[Any], weights: list[float], density: float) -> Any:
    """TIES entry by entry, as the paper writes it (arXiv 2306.01708, algorithm 1)."""
    kept = [weight * pruned(matrix, density) for weight, matrix in zip(weights, matrices, strict=True)]
    out = np.zeros_like(kept[0])
    for place in np.ndindex(out.shape):
        values = [matrix[place] for matrix in kept if matrix[place] != 0]
        agree = [value for value in values if np.sign(value) == np.sign(sum(values))]
        out[place] = np.mean(agree) if agree else 0.0
    return out


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of five rows, the last one shorter."""
    monkeypatch.setattr(arithmetic, "BLOCK_ENTRIES", 5 * SHAPES[V][1] + 3)


def terms(pair: tuple[StoredAdapter, StoredAdapter], weights: list[float]) -> list[tuple[Any, Any]]:
    found = [factors(part, V) for part in pair]
    return [(a[0], weight * b[0]) for (a, b), weight in zip(found, weights, strict=True)]


def whole(entries: Entries) -> Any:
    return np.concatenate(list(entries))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [2.0, -0.5]])
def test_pruning_and_ties_equal_the_same_on_whole_matrices(
    pair: tuple[StoredAdapter, StoredAdapter], weights: list[float], density: float
) -> None:
    matrices = [delta(part, V) for part in pair]
    summed = sum(weight * pruned(matrix, density) for weight, matrix in zip(weights, matrices, strict=True))
    for method, expected in (("magnitude_prune", summed), ("ties", dense_ties(matrices, weights, density))):
        entries = Entries(terms(pair, weights), MergeSettings(method, density=density), V)
        assert distance(whole(entries), expected) < 1e-5, method


@pytest.mark.usefixtures("small_blocks")
def test_dare_drops_entries_and_scales_up_the_others(pair: tuple[StoredAdapter, StoredAdapter]) -> None:
    expected = delta(pair[0], V)
    (term, _) = terms(pair, [1.0, 1.0])
    entries = Entries([term], MergeSettings("dare_linear", density=0.3, seed=7), V)
    found = whole(entries)
    kept = found != 0
    assert abs(kept.mean() - 0.3) < 0.05
    np.testing.assert_allclose(found[kept], expected[kept] / 0.3, rtol=1e-4, atol=1e-5)
    assert np.array_equal(whole(entries), found), "every pass drops the same entries"
    assert np.array_equal(whole(Entries([term], MergeSettings("dare_linear", density=0.3, seed=7), V)), found)
    for other in (Entries([term], MergeSettings("dare_linear", density=0.3, seed=8), V),
                  Entries([term], MergeSettings("dare_linear", density=0.3, seed=7), Q)):  # fmt: skip
        assert not np.array_equal(whole(other) != 0, kept)
    assert not np.array_equal(kept[:5], kept[5:10]), "every block drops its own"


@pytest.mark.usefixtures("small_blocks")
def test_dare_with_ties_elects_among_what_was_kept(pair: tuple[StoredAdapter, StoredAdapter]) -> None:
    parts = terms(pair, [1.0, -1.0])
    found = whole(Entries(parts, MergeSettings("dare_ties", density=0.5), V))
    summed = whole(Entries(parts, MergeSettings("dare_linear", density=0.5), V))
    alone = np.abs(found - summed) < 1e-6  # one adapter kept it, or none did
    assert 0.6 < alone.mean() < 0.95
    assert (np.sign(found[~alone]) == np.sign(summed[~alone])).all(), "the heavier sign wins"


def test_dare_that_keeps_everything_is_the_sum(pair: tuple[StoredAdapter, StoredAdapter]) -> None:
    merged = merge([(pair[0], 1.0), (pair[1], 1.0)], MergeSettings("dare_linear", density=1.0))
    for path in SHAPES:
        assert distance(merged_delta(merged, path), delta(pair[0], path) + delta(pair[1], path)) < 1e-5
    assert merged.relative_error < 1e-5


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "dare_linear", "dare_ties"])
def test_entries_are_cut_to_the_nearest_rank_and_the_error_is_true(
    pair: tuple[StoredAdapter, StoredAdapter], method: str
) -> None:
    settings = MergeSettings(method, density=0.4, rank=6)
    merged = merge([(pair[0], 1.0), (pair[1], 1.0)], settings)
    errors = norms = 0.0
    for path in (Q, V, EXPERTS):
        found = [factors(part, path) for part in pair if f"{path}.lora_a" in part.arrays]
        for expert in range(len(found[0][0])):
            meant = whole(Entries([(a[expert], b[expert]) for a, b in found], settings, f"{path}.{expert}"))
            ours = merged_delta(merged, path)
            ours = ours[expert].T if path == EXPERTS else ours
            best = np.square(meant - dense_best(meant, 6)).sum()
            error = np.square(meant - ours).sum()
            assert error <= 1.001 * best, (path, expert)
            errors, norms = errors + error, norms + np.square(meant).sum()
    assert merged.relative_error == pytest.approx(np.sqrt(errors / norms), rel=1e-5)
    assert (
        merge([(pair[0], 1.0), (pair[1], 1.0)], settings).stored[Q]["lora_a"].tolist()
        == merged.stored[Q]["lora_a"].tolist()
    )


@pytest.mark.parametrize("k", [1, 2, 500, 999, 1000])
@pytest.mark.parametrize("kind", ["spread", "equal", "zeros", "tiny"])
def test_the_kth_largest_is_the_one_that_sorting_finds(kind: str, k: int) -> None:
    values = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    values = {"spread": values**9, "equal": np.round(values), "zeros": values * (values > 1), "tiny": values * 1e-42}[
        kind
    ]
    values = values.astype(np.float32)
    assert kth_largest(lambda: np.split(values, [7, 400]), k) == np.sort(np.abs(values))[-k]


def test_the_range_is_found_where_singular_values_hardly_fall() -> None:
    """Noise of full rank with a weak signal in it: the hardest case, and what DARE makes."""
    generator = np.random.default_rng(2)
    noise = generator.standard_normal((300, 200))
    signal = 4 * generator.standard_normal((300, 5)) @ generator.standard_normal((5, 200))
    matrix = noise + signal
    found = nearest_low_rank(np.split(matrix, [50, 60]), 200, 5)
    (a, b), error, norm = found.cut(5, None)
    assert np.square(matrix - a @ b).sum() == pytest.approx(error, rel=1e-9)
    assert norm == pytest.approx(np.square(matrix).sum(), rel=1e-9)
    assert error <= 1.0001 * np.square(matrix - dense_best(matrix, 5)).sum()


@pytest.mark.real
@pytest.mark.parametrize("method", MERGES)
def test_no_update_is_ever_held_whole(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """1500 × 1500 entries in float32 are 9 MB; merging two adapters of rank 2 stays under half of that."""
    monkeypatch.setitem(SHAPES, Q, (1500, 1500))
    monkeypatch.setattr(arithmetic, "BLOCK_ENTRIES", 20 * 1500)
    parts = [(adapter(name, [Q], rank=2), 1.0) for name in ("one", "two")]
    tracemalloc.start()
    merge(parts, MergeSettings(method, rank=None if method == "cat" else 2))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1500 * 1500 * 4 / 2


def test_thin_svd_is_the_svd_of_the_product() -> None:
    a, b = RANDOM.standard_normal((30, 4)), RANDOM.standard_normal((4, 20))
    found = thin_svd(a, b)
    np.testing.assert_allclose(found.s, np.linalg.svd(a @ b)[1][:4], rtol=1e-12)
    np.testing.assert_allclose(found.u * found.s @ found.vt, a @ b, atol=1e-12)


# --- what can't be merged ---

FAULTS: dict[str, tuple[MergeSettings, str]] = {
    "method": (MergeSettings("tise"), "'tise' is no way to merge; did you mean 'ties'"),
    "cat with a rank": (MergeSettings("cat", rank=3), "cat keeps every rank"),
    "density of svd": (
        MergeSettings("svd", density=0.5),
        "density is for ties, dare_linear, dare_ties, magnitude_prune",
    ),
    "rank": (MergeSettings("svd", rank=0), "rank 0 is below 1"),
    "tolerance": (MergeSettings("svd", tolerance=1.5), "tolerance 1.5 is not between 0 and 1"),
    "density": (MergeSettings("ties", density=0.0), "density 0 is not above 0"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_settings_that_make_no_sense(pair: tuple[StoredAdapter, StoredAdapter], case: str) -> None:
    settings, message = FAULTS[case]
    with pytest.raises(AdapterError, match=message):
        merge([(pair[0], 1.0)], settings)


def changed(stored: StoredAdapter, change: Callable[[StoredAdapter], Any]) -> StoredAdapter:
    change(stored)
    return stored


def test_methods_whose_update_is_no_product_are_refused(pair: tuple[StoredAdapter, StoredAdapter]) -> None:
    dora = changed(pair[1], lambda stored: setattr(stored.manifest, "method", "dora"))
    with pytest.raises(AdapterError, match=r"mail \(dora\): the update is not a product") as caught:
        merge([(pair[0], 1.0), (dora, 1.0)], MergeSettings())
    assert caught.value.hint == "methods that merge: lora, adalora"


def test_modules_of_another_shape_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one = adapter("one", [Q], rank=2)
    monkeypatch.setitem(SHAPES, Q, (48, 41))
    with pytest.raises(AdapterError, match=f"{Q} has different shapes"):
        merge([(one, 1.0), (adapter("two", [Q], rank=2), 1.0)], MergeSettings())


def test_a_module_of_a_smaller_rank_is_taken_without_its_padding() -> None:
    """The file has one rank for all modules; the rank of V alone is 2."""
    stored = adapter("one", [Q, V], rank=4, rank_pattern={"v_proj": 2})
    keep = mx.array([1.0, 1, 0, 0])
    stored.arrays[f"{V}.lora_a"] *= keep
    stored.arrays[f"{V}.lora_b"] *= keep[:, None]
    merged = merge([(stored, 1.0)], MergeSettings("cat"))
    assert merged.ranks == {Q: 4, V: 2}
    assert distance(merged_delta(merged, V), delta(stored, V)) < 1e-6


def test_a_convolution_is_refused() -> None:
    stored = adapter("conv", [Q], rank=3)
    stored.arrays[f"{Q}.lora_a"] = mx.zeros((3, 2, 48))
    with pytest.raises(AdapterError, match=f"{Q} of conv is a convolution"):
        merge([(stored, 1.0)], MergeSettings())


def test_adalora_brings_its_third_factor() -> None:
    stored = adapter("ada", [Q, EXPERTS], rank=3)
    stored.manifest.method = "adalora"
    stored.manifest.adapter = Adapter(method="adalora", rank=3).model_dump()
    strengths = np.array([2.0, 0.0, -1.0])
    stored.arrays[f"{Q}.lora_e"] = mx.array(strengths, mx.float32)
    stored.arrays[f"{EXPERTS}.lora_e"] = mx.array(np.outer([1.0, 2.0, 3.0], strengths).astype(np.float32))
    a, b = (np.array(stored.arrays[f"{Q}.lora_{factor}"].astype(mx.float32)) for factor in "ab")
    merged = merge([(stored, 1.0)], MergeSettings("linear"))
    assert merged.ranks[Q] == 2, "a direction of strength zero is none"
    assert distance(merged_delta(merged, Q), 2.0 * (a * strengths) @ b) < 1e-6
    a, b = (np.array(stored.arrays[f"{EXPERTS}.lora_{factor}"].astype(mx.float32)) for factor in "ab")
    last = 2.0 * (b[2] * (3 * strengths)) @ a[2]
    assert distance(merged_delta(merged, EXPERTS)[2], last) < 1e-6
