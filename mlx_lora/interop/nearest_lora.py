"""The LoRA adapter nearest to an adapter of any method that changes weights.

LoRA itself, AdaLoRA, QA-LoRA and VeRA are products of two factors: a rank that holds them loses nothing. Of the others
ΔW is formed, one weight at a time, and the leading singular triplets are kept.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlx_lora.adapters.attach import Wrappers
from mlx_lora.adapters.base import EMBEDDINGS, EXPERTS, LINEARS, AdapterLayer
from mlx_lora.adapters.dora import DoRA
from mlx_lora.adapters.lora import LoRA
from mlx_lora.adapters.qalora import QALoRA
from mlx_lora.adapters.vera import VeRA
from mlx_lora.errors import AdapterError, CannotFuse
from mlx_lora.interop.neutral import Array, Module, Neutral, as_numpy, expanded, kind_of, module_of
from mlx_lora.store.arithmetic import thin_svd
from mlx_lora.store.low_rank import Svd, nearest_low_rank

BLOCK_ROWS = 1024


def as_lora(wrappers: Wrappers, rank: int, *, on_module: Callable[[], None] = lambda: None) -> tuple[Neutral, float]:
    """The LoRA adapter of at most `rank` nearest to any adapter that changes weights, and its relative error.

    The error is ‖ΔW' − ΔW‖ / ‖ΔW‖, Frobenius norms over all modules together; exactly 0 where the rank holds it all.
    One weight is in memory at a time. Raises AdapterError for a module whose weight can't be changed by LoRA, and where
    more than a weight is changed, such as a bias.
    """
    modules, lost, norm = {}, 0.0, 0.0
    for path, wrapper in wrappers.items():
        _check_weight_alone(wrapper, path)
        kind = kind_of(wrapper.base)
        parts = [_cut(matrix, rank) for matrix in _updates(wrapper)]
        lost, norm = lost + sum(part[2] for part in parts), norm + sum(part[3] for part in parts)
        modules[path] = _joined(kind, [(left, right) for left, right, _, _ in parts])
        on_module()
    return Neutral("lora", modules), float(np.sqrt(lost / norm)) if norm else 0.0


def _check_weight_alone(wrapper: AdapterLayer, path: str) -> None:
    if not isinstance(wrapper.base, (*LINEARS, *EMBEDDINGS, *EXPERTS)):
        raise AdapterError(f"{path}: a {type(wrapper.base).__name__} has no LoRA", hint="fuse merges it as it is")
    try:
        fused, base = wrapper.fuse(), wrapper.base
    except CannotFuse as error:
        raise AdapterError(f"{path}: {error.message}", hint=error.hint) from None
    before, after = (layer["bias"] if "bias" in layer else None for layer in (base, fused))
    same = before is after or (before is not None and after is not None and mx.allclose(before, after).item())
    if not same:
        raise AdapterError(f"{path}: its bias is changed too, which LoRA can't say", hint="fuse merges it as it is")


def _updates(wrapper: AdapterLayer) -> list[tuple[Array, Array] | Array]:
    """ΔW of each expert, or of the one weight: as two factors (out, r) and (r, in), or whole (out, in)."""
    if isinstance(wrapper, LoRA) and not isinstance(wrapper, DoRA):
        module = module_of(wrapper, "lora")
    elif isinstance(wrapper, QALoRA):
        module = expanded(module_of(wrapper, "qalora"))
    elif isinstance(wrapper, VeRA):
        a, b = (as_numpy(part) for part in wrapper.projections())
        vectors = [as_numpy(wrapper[name]) for name in ("vera_b", "vera_d")]
        many = zip(*(vector.reshape(-1, vector.shape[-1]) for vector in vectors), strict=True)
        return [(own_b[:, None] * b, own_d[:, None] * a.T) for own_b, own_d in many]
    else:
        delta = as_numpy(wrapper.delta())
        return list(delta) if delta.ndim == 3 else [delta.T if kind_of(wrapper.base) == "embedding" else delta]
    assert module.a is not None and module.b is not None
    a, b = (array if array.ndim == 3 else array[None] for array in (module.a, module.b))
    return [(np.float32(module.scale) * own_b, own_a) for own_a, own_b in zip(a, b, strict=True)]


def _cut(update: tuple[Array, Array] | Array, rank: int) -> tuple[Array, Array, float, float]:
    """Factors (out, k) and (k, in) of at most `rank`, with the squares of the error and of the norm."""
    if isinstance(update, tuple) and update[1].shape[0] <= rank:
        left, right = update
        return left, right, 0.0, float(((left.T @ left) * (right @ right.T)).sum())
    svd: Svd
    if isinstance(update, tuple):
        svd = thin_svd(*(factor.astype(np.float64) for factor in update))
    else:
        blocks = [update[start : start + BLOCK_ROWS] for start in range(0, len(update), BLOCK_ROWS)]
        svd = nearest_low_rank([block.astype(np.float64) for block in blocks], update.shape[1], rank)
    (left, right), error, norm = svd.cut(rank, None)
    return left.astype(np.float32), right.astype(np.float32), error, norm


def _joined(kind: str, pairs: list[tuple[Array, Array]]) -> Module:
    """The factors of one weight, or of all experts padded to one rank, as a module."""
    if kind != "experts":
        left, right = pairs[0]
        return Module(kind, np.ascontiguousarray(right), np.ascontiguousarray(left))
    rank = max(right.shape[0] for _, right in pairs)
    a = np.stack([np.pad(right, ((0, rank - len(right)), (0, 0))) for _, right in pairs])
    b = np.stack([np.pad(left, ((0, 0), (0, rank - left.shape[1]))) for left, _ in pairs])
    return Module(kind, a, b)
