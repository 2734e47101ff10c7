"""Adding adapters up: the weighted sum of their updates ΔW, stored as one LoRA adapter.

    cat                      the sum itself: factors side by side, rank Σr
    linear                   the sum itself, at the smallest rank that holds it
    svd                      the nearest matrix to the sum at a lower rank
    magnitude_prune          the sum of every ΔW's largest entries
    ties                     those entries; of each, the mean of those with the heavier sign (arXiv 2306.01708)
    dare_linear, dare_ties   entries dropped at random and the others scaled up (arXiv 2311.03099), then sum or election

Always on ΔW, never on A and B apart, whose sums have cross terms. No ΔW is held whole. Sums stay products of thin
matrices: QR of both stacks and an SVD of the small core. What works on single entries makes ΔW a block of rows at a
time, as often as it is needed, and finds the nearest low rank by subspace iteration; how far off that is comes out
exactly. Knows nothing of base models: it stays in the orientation of the files, where a linear layer's product is ΔWᵀ.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError, nearest
from mlx_lora.methods import MERGES, parts
from mlx_lora.store.adapter import StoredAdapter
from mlx_lora.store.low_rank import Array, Factors, Svd, nearest_low_rank
from mlx_lora.store.manifest import MLX_LM

# Methods that train two factors of every weight, and those of them whose update is nothing but their product.
FACTORED = ("lora", "dora", "qalora", "adalora")
ADDITIVE = ("lora", "adalora")
EXACT = ("cat", "linear", "svd")
DENSITY = 0.5
NOTHING_LOST = 1e-6
BLOCK_ENTRIES = 1 << 20


@dataclass(frozen=True)
class MergeSettings:
    """How to merge. `rank` is the most a module may have; within `tolerance` of ‖ΔW‖_F it gets as little as it can.

    `density` is the share of entries that are kept, `seed` decides which where that is random.
    """

    method: str = "cat"
    rank: int | None = None
    tolerance: float | None = None
    density: float | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise AdapterError for what is unknown, out of range, or no setting of the method."""
        if self.method not in MERGES:
            raise AdapterError(f"{self.method!r} is no way to merge{nearest(self.method, MERGES)}")
        faults = []
        if self.method == "cat" and (self.rank is not None or self.tolerance is not None):
            faults.append("cat keeps every rank; svd is the one that cuts")
        if self.method in EXACT and self.density is not None:
            others = [method for method in MERGES if method not in EXACT]
            faults.append(f"{self.method} keeps every entry; density is for {', '.join(others)}")
        if self.rank is not None and self.rank < 1:
            faults.append(f"rank {self.rank} is below 1")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            faults.append(f"tolerance {self.tolerance:g} is not between 0 and 1")
        if self.density is not None and not 0 < self.density <= 1:
            faults.append(f"density {self.density:g} is not above 0 and at most 1")
        if faults:
            raise AdapterError("; ".join(faults))


@dataclass
class Merged:
    """Factors by module as files hold them, float32; `relative_error` is ‖merged − meant‖_F / ‖meant‖_F over all.

    What is meant is the sum, or what the method makes of the entries, before it is cut to a rank.
    """

    stored: dict[str, dict[str, mx.array]]
    ranks: dict[str, int]
    relative_error: float


def factors(adapter: StoredAdapter, path: str) -> Factors:
    """a (E, in, r) and b (E, r, out), float64, whose product is ΔWᵀ, for an embedding ΔW; E is 1 but for experts.

    The scale, and AdaLoRA's Λ, are in b; r is the module's own rank, without padding. For DoRA this is the direction's
    update, for QA-LoRA `in` counts groups. Raises AdapterError where the module has no such factors.
    """
    found = [adapter.arrays.get(f"{path}.{name}") for name in ("lora_a", "lora_b", "lora_e")]
    if found[0] is None or found[1] is None:
        raise AdapterError(f"{adapter.name} has no lora_a and lora_b for {path}")
    a, b = (np.array(array.astype(mx.float32), np.float64) for array in found[:2] if array is not None)
    if a.ndim != b.ndim:
        raise AdapterError(f"{path} of {adapter.name} is a convolution; linear, embedding and expert layers work here")
    a, b = (a[None], b[None]) if a.ndim == 2 else (a.swapaxes(1, 2), b.swapaxes(1, 2))
    if a.shape[2] != b.shape[1]:
        raise AdapterError(f"{adapter.name}: the factors of {path} have ranks {a.shape[2]} and {b.shape[1]}")
    one_scale = adapter.manifest.method in MLX_LM
    if found[2] is not None:
        b = b * np.array(found[2].astype(mx.float32), np.float64).reshape(len(b), -1, 1)
    rank = min(Adapter.model_validate(adapter.manifest.adapter).rank_of(path), a.shape[2]) if one_scale else a.shape[2]
    return a[..., :rank], b[:, :rank] * (adapter.scale if one_scale else adapter.manifest.scales[path])


def modules_of(adapter: StoredAdapter) -> list[str]:
    """Modules with two factors, in the manifest's order. Raises AdapterError for a method that has none."""
    if not set(parts(adapter.manifest.method)).intersection(FACTORED):
        raise AdapterError(
            f"{adapter.name} is of method {adapter.manifest.method}, which has no two factors A and B",
            hint=f"methods that have: {', '.join(FACTORED)}",
        )
    return [path for path in adapter.manifest.modules if f"{path}.lora_a" in adapter.arrays]


def merge(adapters: Sequence[tuple[StoredAdapter, float]], settings: MergeSettings) -> Merged:
    """The weighted sum of the adapters' updates; a module that an adapter doesn't have counts as zero there.

    Raises AdapterError for settings and methods that can't be used, and for modules of different shapes.
    """
    settings.check()
    _check_additive([adapter for adapter, _ in adapters])
    paths = list(dict.fromkeys(path for adapter, _ in adapters for path in modules_of(adapter)))
    stored, ranks, error, norm = {}, {}, 0.0, 0.0
    for path in paths:
        terms = [
            (a, weight * b)
            for adapter, weight in adapters
            if f"{path}.lora_a" in adapter.arrays
            for a, b in [factors(adapter, path)]
        ]
        if len({(len(a), a.shape[1], b.shape[2]) for a, b in terms}) > 1:
            raise AdapterError(f"{path} has different shapes in these adapters", hint="merge adapters of one base")
        experts = [
            _merge([(a[index], b[index]) for a, b in terms], settings, f"{path}.{index}")
            for index in range(len(terms[0][0]))
        ]
        ranks[path] = max(pair[0].shape[1] for pair, _, _ in experts)
        error, norm = error + sum(part[1] for part in experts), norm + sum(part[2] for part in experts)
        first = next(array for adapter, _ in adapters if (array := adapter.arrays.get(f"{path}.lora_a")) is not None)
        stored[path] = _as_stored([pair for pair, _, _ in experts], ranks[path], switch=first.ndim == 3)
    return Merged(stored, ranks, float(np.sqrt(error / norm)) if norm else 0.0)


def _check_additive(adapters: Sequence[StoredAdapter]) -> None:
    others = [adapter for adapter in adapters if adapter.manifest.method not in ADDITIVE]
    wrong = [f"{adapter.name} ({adapter.manifest.method})" for adapter in others]
    if wrong:
        raise AdapterError(
            f"{', '.join(wrong)}: the update is not a product of two factors, so it can't be added to others",
            hint=f"methods that merge: {', '.join(ADDITIVE)}",
        )


def _as_stored(pairs: list[Factors], rank: int, *, switch: bool) -> dict[str, mx.array]:
    """lora_a (in, r), lora_b (r, out); for experts lora_a (E, r, in), lora_b (E, out, r), padded to one rank."""
    a = np.stack([np.pad(a, ((0, 0), (0, rank - a.shape[1]))) for a, _ in pairs]).astype(np.float32)
    b = np.stack([np.pad(b, ((0, rank - len(b)), (0, 0))) for _, b in pairs]).astype(np.float32)
    a, b = (a.swapaxes(1, 2), b.swapaxes(1, 2)) if switch else (a[0], b[0])
    return {"lora_a": mx.array(np.ascontiguousarray(a)), "lora_b": mx.array(np.ascontiguousarray(b))}


def _merge(terms: list[Factors], settings: MergeSettings, key: str) -> tuple[Factors, float, float]:
    """One matrix: its factors, and the squares of error and norm."""
    stacked = np.concatenate([a for a, _ in terms], axis=1), np.concatenate([b for _, b in terms], axis=0)
    rank, tolerance = settings.rank or stacked[0].shape[1], settings.tolerance
    if settings.method == "cat":
        return stacked, 0.0, 0.0
    if settings.method == "svd" and settings.rank is None and tolerance is None:
        rank = max(a.shape[1] for a, _ in terms)
    if settings.method == "linear" and settings.rank is None and tolerance is None:
        tolerance = NOTHING_LOST
    if settings.method in EXACT:
        return thin_svd(*stacked).cut(rank, tolerance)
    entries = Entries(terms, settings, key)
    return nearest_low_rank(entries, entries.columns, rank, seed=settings.seed).cut(rank, tolerance)


def thin_svd(a: Array, b: Array) -> Svd:
    """The singular value decomposition of a (rows, r) · b (r, columns) without forming it; k is at most r."""
    left, core_a = np.linalg.qr(a)
    right, core_b = np.linalg.qr(b.T)
    u, s, vt = np.linalg.svd(core_a @ core_b.T, full_matrices=False)
    return Svd(left @ u, s, vt @ right.T)


class Entries:
    """The merged ΔW of one matrix, made again a block of rows at a time whenever it is iterated: always the same."""

    def __init__(self, terms: list[Factors], settings: MergeSettings, key: str):
        self.terms = [(a.astype(np.float32), b.astype(np.float32)) for a, b in terms]
        self.method, self.seed, self.key = settings.method, settings.seed, zlib.crc32(key.encode())
        self.density = DENSITY if settings.density is None else settings.density
        self.rows, self.columns = len(terms[0][0]), terms[0][1].shape[1]
        self.step = max(1, BLOCK_ENTRIES // self.columns)
        kept = max(1, round(self.density * self.rows * self.columns))
        pruned = self.terms if self.method in ("ties", "magnitude_prune") else []
        self.thresholds = [kth_largest(partial(self._products, *term), kept) for term in pruned]

    def _products(self, a: Array, b: Array) -> Iterator[Array]:
        return (a[start : start + self.step] @ b for start in range(0, self.rows, self.step))

    def __iter__(self) -> Iterator[Array]:
        for start, blocks in enumerate(zip(*(self._products(*term) for term in self.terms), strict=True)):
            kept = np.stack([self._kept(index, start, block) for index, block in enumerate(blocks)])
            yield (_elected(kept) if self.method in ("ties", "dare_ties") else kept.sum(axis=0)).astype(np.float64)

    def _kept(self, index: int, start: int, block: Array) -> Array:
        """A block of one adapter's update, with zeros in place of what is dropped."""
        if self.thresholds:
            return np.where(np.abs(block) >= self.thresholds[index], block, np.float32(0))
        generator = np.random.default_rng([self.seed, self.key, index, start])
        mask = generator.random(block.shape, dtype=np.float32) < self.density
        return np.where(mask, block / np.float32(self.density), np.float32(0))


def _elected(updates: Array) -> Array:
    """Of weighted updates (adapters, rows, columns): the mean of those whose sign is the sum's; zeros have no say.

    A negative weight votes against what it subtracts.
    """
    sign = np.sign(updates.sum(axis=0))
    agree = (np.sign(updates) == sign) & (sign != 0)
    return np.where(agree, updates, 0).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)  # type: ignore[no-any-return]


def kth_largest(blocks: Callable[[], Iterable[Array]], k: int) -> np.float32:
    """The k-th largest magnitude among all entries of float32 blocks, exactly, in two passes.

    The bits of non-negative floats have the order of their values: count the upper halves, then the lower ones.
    """

    def bits() -> Iterator[Array]:
        return (np.abs(block).view(np.uint32).ravel() for block in blocks())

    upper = sum(np.bincount(part >> 16, minlength=1 << 15) for part in bits())
    high, left = _counted_down(upper, k)
    lower = sum(np.bincount(part[part >> 16 == high] & 0xFFFF, minlength=1 << 16) for part in bits())
    low, _ = _counted_down(lower, left)
    return np.uint32(high << 16 | low).view(np.float32)


def _counted_down(counts: Any, k: int) -> tuple[int, int]:
    """The index at which counting from the end reaches k, and how many of k are left for it."""
    reached = np.cumsum(counts[::-1])
    place = int(np.searchsorted(reached, k))
    return len(counts) - 1 - place, k - int(reached[place] - counts[::-1][place])
