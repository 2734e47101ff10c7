"""Singular value decompositions of matrices that are never whole in memory, and factors cut from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_lora.errors import AdapterError

Array = NDArray[Any]
# A product of thin matrices: a (rows, r) and b (r, columns).
Factors = tuple[Array, Array]
# Subspace iteration: directions beyond the rank, and passes over the matrix.
EXTRA, PASSES = 10, 4


@dataclass(frozen=True)
class Svd:
    """u (rows, k) · s (k) · vt (k, columns), and the squared Frobenius norm of what lies outside of it."""

    u: Array
    s: Array
    vt: Array
    outside: float = 0.0

    def cut(self, rank: int, tolerance: float | None) -> tuple[Factors, float, float]:
        """Balanced factors of rank `rank`, or less within `tolerance`; with the squares of error and norm.

        Raises AdapterError where that rank is too low for the tolerance.
        """
        squares = np.square(self.s)
        errors = self.outside + np.append(np.cumsum(squares[::-1])[::-1], 0.0)  # errors[k]: what rank k leaves out
        norm, rank = float(errors[0]), min(rank, len(self.s))
        if tolerance is not None:
            within = np.flatnonzero(errors <= tolerance**2 * norm)
            if not len(within) or within[0] > rank:
                reached = float(np.sqrt(errors[rank] / norm))
                raise AdapterError(
                    f"rank {rank} leaves a relative error of {reached:.3g}, and the tolerance is {tolerance:g}",
                    hint="raise --rank or --tolerance",
                )
            rank = max(int(within[0]), 1)
        root = np.sqrt(self.s[:rank])
        return (self.u[:, :rank] * root, root[:, None] * self.vt[:rank]), float(errors[rank]), norm


def nearest_low_rank(entries: Iterable[Array], columns: int, rank: int, *, seed: int = 0) -> Svd:
    """The leading singular triplets of a matrix M given as blocks of rows, by randomized subspace iteration.

    Halko, Martinsson and Tropp (arXiv 0909.4061), algorithm 4.4, on MᵀM so that one pass serves both of its products.
    The result is M projected onto an orthonormal basis, so what lies outside is ‖M‖² minus the squares of s, exactly.
    """
    size = min(rank + EXTRA, columns)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((columns, size)))
    for _ in range(PASSES):
        basis, _ = np.linalg.qr(sum(block.T @ (block @ basis) for block in entries))
    images, norm = [], 0.0
    for block in entries:
        images.append(block @ basis)
        norm += float(np.square(block).sum())
    u, s, vt = np.linalg.svd(np.concatenate(images), full_matrices=False)
    return Svd(u, s, vt @ basis.T, outside=max(norm - float(np.square(s).sum()), 0.0))
