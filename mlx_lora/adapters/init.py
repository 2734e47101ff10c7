"""Where LoRA's factors begin, other than at random: from the weight (PiSSA, OLoRA), from what packing it lost (LoftQ),
or from the activations that enter it (EVA).

PiSSA and OLoRA begin at a part A₀, B₀ of the weight itself and leave the rest to the base. Here no base is changed:
the wrapper keeps A₀ and B₀, frozen, and the residual stays implicit, over a packed base too (whose unpacked weight is
taken apart):

    y = W₀x + s(BA − B₀A₀)x,    BA − B₀A₀ = B(A − A₀) + (B − B₀)A₀

The right side is one product of rank 2r over the original base. It is zero at the start, bit for bit, and nothing large
cancels in it, so it may be rounded: that is how it is computed and stored.

LoftQ needs the weights from before packing and EVA rows of training data, which a layer alone doesn't have: until
`loftq` or `eva` is called, their factors begin as by default. Everything for a layer is built lazily; matrices are
taken apart in float32, where MLX can: on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.adapters.base import layer_shape
from mlx_lora.config import Adapter
from mlx_lora.models.layers import set_modules
from mlx_lora.quant.quantize import dequantize_layer

FROM_WEIGHT = ("pissa", "olora")
# EVA: no module gets more than this many times its rank; between batches more directions are kept than may be used.
RHO, KEPT = 2.0, 4


def from_weight(layer: nn.Module, name: str, rank: int, scale: float) -> tuple[mx.array, mx.array]:
    """The part of a layer's weight (…, m, n) that `name` begins at: left (…, m, r), right (…, r, n), float32.

    pissa (arXiv 2404.02948, eq. 2, 3): √S-weighted singular vectors, so that s · left · right is the best approximation
    of rank r. olora (arXiv 2406.01775): the first r columns of Q and rows of R in W = QR, not divided by s.
    """
    weight = dequantize_layer(layer, mx.float32)
    if name == "pissa":
        return principal(weight, rank, scale)
    # a column of Q depends on the columns before it alone: the others needn't be taken apart
    left, _ = mx.linalg.qr(weight[..., :rank], stream=mx.cpu)
    return left, left.swapaxes(-1, -2) @ weight


def principal(matrix: mx.array, rank: int, scale: float) -> tuple[mx.array, mx.array]:
    """left (…, m, r), right (…, r, n) with s · left · right the best approximation of rank r, the weight √S in each."""
    left, values, right = thin_svd(matrix)
    roots = mx.sqrt(values[..., :rank] / scale)
    return left[..., :rank] * roots[..., None, :], roots[..., None] * right[..., :rank, :]


def thin_svd(matrix: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """U (…, m, k), S (…, k), Vᵀ (…, k, n) with k = min(m, n); S is NaN for a matrix with an entry that isn't finite.

    MLX's own makes U and V square, as wide as a vocabulary: QR first leaves it a matrix of the smaller dimension.
    MLX's SVD fails on NaN. Its CPU backend counts the failed operation as running, and once memory is at its limit, it
    waits for that operation for ever. So a matrix that isn't finite is replaced by zeros before the SVD.
    """
    if matrix.shape[-2] < matrix.shape[-1]:
        left, values, right = thin_svd(matrix.swapaxes(-1, -2))
        return right.swapaxes(-1, -2), values, left.swapaxes(-1, -2)
    q, r = mx.linalg.qr(matrix, stream=mx.cpu)
    finite = mx.isfinite(r).all(axis=(-2, -1), keepdims=True)
    left, values, right = mx.linalg.svd(mx.where(finite, r, 0), stream=mx.cpu)
    return q @ left, mx.where(finite[..., 0], values, mx.nan), right


def loftq(wrappers: Mapping[str, Any], originals: dict[str, mx.array]) -> None:
    """Begin at s · BA = SVD_r(W − Q(W)): LoftQ with one round (arXiv 2310.08659, algorithm 1), Q being the packed base.

    `originals` are the weights before packing, by module path; each is taken out of it, so that a lazily read one is
    freed before the next is read.
    """
    for path, wrapper in wrappers.items():
        if "lora_a" not in wrapper:  # of the other method in a combination
            continue
        lost = originals.pop(path).astype(mx.float32) - dequantize_layer(wrapper.base, mx.float32)
        wrapper.take(*principal(lost, wrapper.rank, wrapper.scale))
        mx.eval(wrapper.adapter_arrays())


class _Recorder(nn.Module):
    """Stands in for a linear: lets it compute and tells what entered it."""

    def __init__(self, layer: nn.Module, tell: Callable[[mx.array], None]):
        super().__init__()
        self.layer, self._tell = layer, tell

    def __call__(self, x: mx.array) -> mx.array:
        self._tell(x)
        return self.layer(x)  # type: ignore[no-any-return]


class Spectrum:
    """What activations (n, d) look like, from batch to batch: singular directions, strongest first, and all variance.

    `rows` (k, d) are S · Vᵀ of a truncated incremental SVD; `total` is Σ S² of everything that was seen.
    """

    def __init__(self, keep: int):
        self.keep, self.rows, self.total = keep, mx.zeros((0, 0)), mx.array(0.0)

    def add(self, activations: mx.array) -> None:
        activations = activations.astype(mx.float32)
        seen = mx.concatenate([self.rows, activations]) if self.rows.size else activations
        _, values, right = thin_svd(seen)
        self.rows = values[: self.keep, None] * right[: self.keep]
        self.total = self.total + mx.square(activations).sum()

    def shares(self) -> list[float]:
        """The share of the variance, Σ S², that each direction explains."""
        return [float(share) for share in np.array(mx.square(self.rows).sum(axis=1) / self.total)]

    def directions(self, count: int) -> mx.array:
        """The first `count` right-singular vectors as columns, (d, count)."""
        rows = self.rows[:count]
        return (rows / mx.maximum(mx.linalg.norm(rows, axis=1, keepdims=True), 1e-30)).T


def eva(
    model: nn.Module, layers: Mapping[str, nn.Module], config: Adapter, batches: Iterable[tuple[mx.array, mx.array]]
) -> tuple[Adapter, dict[str, mx.array]]:
    """EVA (arXiv 2410.07170): settings with the ranks redistributed, and A (in, rank) of each module, its B being zero.

    `layers` are the linears of `model` to adapt, by path; each batch is tokens (B, T) and the positions (N,) of the
    flattened batch that count. A is made of the right-singular vectors of the activations that enter. The ranks, as
    many as before in all, go to the directions that explain the largest share of their module's variance; a module
    keeps at least one (the paper drops those with none) and gets at most RHO times its own. Scales stay what they were.
    A module that nothing enters keeps its rank, and has no A here. Raises FloatingPointError for activations that
    aren't finite.
    """
    spectra = {path: Spectrum(KEPT * round(RHO * config.rank_of(path))) for path in layers}
    entered: dict[str, mx.array] = {}
    recorders = {path: _Recorder(layer, partial(entered.__setitem__, path)) for path, layer in layers.items()}
    set_modules(model, dict(recorders))
    try:
        for tokens, positions in batches:
            model(tokens)  # lazily: what comes after the last of these layers is never computed
            _look(entered, spectra, positions)
    finally:
        set_modules(model, dict(layers))
    shares = {}
    for path, found in ((path, spectrum.shares()) for path, spectrum in spectra.items() if spectrum.rows.size):
        most = min(round(RHO * config.rank_of(path)), *layer_shape(layers[path]))
        shares[path] = found[:most]
    ranks = redistribute(shares, sum(map(config.rank_of, shares)))
    return config.with_ranks(ranks), {path: spectra[path].directions(rank) for path, rank in ranks.items()}


def _look(entered: dict[str, mx.array], spectra: dict[str, Spectrum], positions: mx.array) -> None:
    """Add what entered in one pass; linears that share their input, such as q, k and v, share the work."""
    done: dict[tuple[int, int], Spectrum] = {}
    for path, activations in entered.items():
        place = id(activations), spectra[path].keep
        if place not in done:
            spectra[path].add(activations.reshape(-1, activations.shape[-1])[positions])
            done[place] = spectra[path]
        spectra[path] = done[place]
    del activations
    entered.clear()  # each is freed once it was looked at
    for spectrum in done.values():
        mx.eval(spectrum.rows, spectrum.total)
        if not mx.isfinite(spectrum.rows).all().item():
            path = next(path for path, found in spectra.items() if found is spectrum)
            raise FloatingPointError(f"what enters {path} isn't finite")


def redistribute(shares: Mapping[str, list[float]], budget: int) -> dict[str, int]:
    """Ranks by module: one each, and the rest of `budget` to the largest shares (falling within a module)."""
    rest = sorted(((-share, path) for path, found in shares.items() for share in found[1:]), key=lambda item: item[0])
    ranks = dict.fromkeys(shares, 1)
    for _, path in rest[: max(budget - len(ranks), 0)]:
        ranks[path] += 1
    return ranks
