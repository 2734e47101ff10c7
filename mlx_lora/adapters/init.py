"""Initial values of LoRA's factors that aren't random: from the weight (PiSSA, OLoRA), from its quantization error
(LoftQ), or from the activations that enter the layer (EVA).

PiSSA and OLoRA start from factors A₀, B₀ of a part of the weight, and subtract that part from the base. Here the base
doesn't change: the wrapper keeps A₀ and B₀, frozen, and subtracts their product itself. The same works over a packed
base, whose unpacked weight is factorized:

    y = W₀x + s(BA − B₀A₀)x,    BA − B₀A₀ = B(A − A₀) + (B − B₀)A₀

The update is computed and stored as the right side, one product of rank 2r over the original base. It is zero at the
start, bit for bit. No large terms cancel in it, so rounding it to half precision does no harm.

LoftQ needs the unquantized weights, and EVA needs training rows. Neither is known when a layer is wrapped, so until
`loftq` or `eva` is called, their factors have the default values. A layer's arrays are built lazily. QR and SVD run in
float32 on the CPU, because MLX has them only there.
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
# EVA: a module gets at most RHO times its rank. Between batches, OVERSAMPLING times as many directions are kept.
RHO, OVERSAMPLING = 2.0, 4


def from_weight(layer: nn.Module, name: str, rank: int, scale: float) -> tuple[mx.array, mx.array]:
    """The factors that `name` computes from a layer's weight (…, m, n): left (…, m, r), right (…, r, n), float32.

    pissa (arXiv 2404.02948, eq. 2, 3): √S-weighted singular vectors, so that s · left · right is the best approximation
    of rank r. olora (arXiv 2406.01775): the first r columns of Q and rows of R in W = QR, not divided by s.
    """
    weight = dequantize_layer(layer, mx.float32)
    if name == "pissa":
        return principal(weight, rank, scale)
    # the first r columns of Q depend only on the first r columns of W
    left, _ = mx.linalg.qr(weight[..., :rank], stream=mx.cpu)
    return left, left.swapaxes(-1, -2) @ weight


def principal(matrix: mx.array, rank: int, scale: float) -> tuple[mx.array, mx.array]:
    """left (…, m, r), right (…, r, n), both weighted by √S: s · left · right is the best approximation of rank r."""
    left, values, right = thin_svd(matrix)
    roots = mx.sqrt(values[..., :rank] / scale)
    return left[..., :rank] * roots[..., None, :], roots[..., None] * right[..., :rank, :]


def thin_svd(matrix: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """U (…, m, k), S (…, k), Vᵀ (…, k, n) with k = min(m, n); S is NaN for a matrix with an entry that isn't finite.

    MLX's SVD makes U and V square, for an embedding as wide as the vocabulary. QR comes first, so that the SVD gets a
    square matrix of the smaller dimension.

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
    """Set s · BA = SVD_r(W − Q(W)): LoftQ with one round (arXiv 2310.08659, algorithm 1); Q(W) is the packed base.

    `originals` are the unquantized weights by module path. Each is popped, so that a lazily read weight is freed before
    the next one is read.
    """
    for path, wrapper in wrappers.items():
        if "lora_a" not in wrapper:  # a wrapper of the other method in a combination
            continue
        error = originals.pop(path).astype(mx.float32) - dequantize_layer(wrapper.base, mx.float32)
        wrapper.set_factors(*principal(error, wrapper.rank, wrapper.scale))
        mx.eval(wrapper.adapter_arrays())


class _Recorder(nn.Module):
    """Replaces a linear: passes the input to `record`, then computes what the linear does."""

    def __init__(self, layer: nn.Module, record: Callable[[mx.array], None]):
        super().__init__()
        self.layer, self._record = layer, record

    def __call__(self, x: mx.array) -> mx.array:
        self._record(x)
        return self.layer(x)  # type: ignore[no-any-return]


class Spectrum:
    """A truncated SVD of activations (n, d), updated batch by batch.

    `rows` (k, d) are S · Vᵀ, strongest first, at most `limit` of them; `total` is Σ S² of all activations so far.
    """

    def __init__(self, limit: int):
        self.limit, self.rows, self.total = limit, mx.zeros((0, 0)), mx.array(0.0)

    def add(self, activations: mx.array) -> None:
        activations = activations.astype(mx.float32)
        stacked = mx.concatenate([self.rows, activations]) if self.rows.size else activations
        _, values, right = thin_svd(stacked)
        self.rows = values[: self.limit, None] * right[: self.limit]
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
    """EVA (arXiv 2410.07170): settings with redistributed ranks, and each module's A (in, rank); B starts at zero.

    `layers` are the linears of `model` to adapt, by path; each batch is tokens (B, T) and the positions (N,) of the
    flattened batch that count. The columns of A are right-singular vectors of the module's inputs. The sum of the ranks
    stays the same: ranks go to the directions that explain the largest share of their module's variance. A module gets
    at least rank 1 (the paper drops modules with none) and at most RHO times its rank. Scales don't change. A module
    that no activations enter keeps its rank and gets no A. Raises FloatingPointError if activations aren't finite.
    """
    spectra = {path: Spectrum(OVERSAMPLING * round(RHO * config.rank_of(path))) for path in layers}
    inputs: dict[str, mx.array] = {}
    recorders = {path: _Recorder(layer, partial(inputs.__setitem__, path)) for path, layer in layers.items()}
    set_modules(model, dict(recorders))
    try:
        for tokens, positions in batches:
            model(tokens)  # lazy: nothing after the last recorded layer is computed
            _add_inputs(inputs, spectra, positions)
    finally:
        set_modules(model, dict(layers))
    shares = {}
    for path, spectrum in spectra.items():
        if spectrum.rows.size:
            most = min(round(RHO * config.rank_of(path)), *layer_shape(layers[path]))
            shares[path] = spectrum.shares()[:most]
    ranks = redistribute(shares, sum(map(config.rank_of, shares)))
    return config.with_ranks(ranks), {path: spectra[path].directions(rank) for path, rank in ranks.items()}


def _add_inputs(inputs: dict[str, mx.array], spectra: dict[str, Spectrum], positions: mx.array) -> None:
    """Add the inputs of one forward pass to the spectra. Linears with the same input (q, k, v) share a spectrum."""
    updated: dict[tuple[int, int], Spectrum] = {}
    for path, activations in inputs.items():
        key = id(activations), spectra[path].limit
        if key not in updated:
            spectra[path].add(activations.reshape(-1, activations.shape[-1])[positions])
            updated[key] = spectra[path]
        spectra[path] = updated[key]
    del activations
    inputs.clear()  # evaluating a spectrum then frees its activations
    for spectrum in updated.values():
        mx.eval(spectrum.rows, spectrum.total)
        if not mx.isfinite(spectrum.rows).all().item():
            path = next(path for path, candidate in spectra.items() if candidate is spectrum)
            raise FloatingPointError(f"what enters {path} isn't finite")


def redistribute(shares: Mapping[str, list[float]], budget: int) -> dict[str, int]:
    """Ranks by module: 1 each; the rest of `budget` goes to the largest shares (each list is in falling order)."""
    rest = sorted(((-share, path) for path, each in shares.items() for share in each[1:]), key=lambda item: item[0])
    ranks = dict.fromkeys(shares, 1)
    for _, path in rest[: max(budget - len(ranks), 0)]:
        ranks[path] += 1
    return ranks
