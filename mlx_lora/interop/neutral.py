"""An adapter between formats: every module with its true rank and scale, float32, as numpy arrays.

mlx-lm's files have one rank and one scale for all modules, PEFT's name patterns, GGUF's take the rank from the arrays.
What is common to all of them is here, and every format is a pair of functions to and from it. Factors are oriented as
in the papers and in PEFT, ΔW = s·B A with A (r, in) and B (out, r).

`from_wrappers` reads an adapter that was checked against its base. Methods without such a form are refused by name;
`as_lora` finds the nearest one for those that change weights. `to_store` writes an adapter of ours.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_lora.adapters.attach import Wrappers
from mlx_lora.adapters.base import EMBEDDINGS, EXPERTS, LINEARS, AdapterLayer, layer_shape
from mlx_lora.adapters.dora import DoRA
from mlx_lora.adapters.ia3 import IA3
from mlx_lora.adapters.lora import LoRA
from mlx_lora.adapters.qalora import QALoRA
from mlx_lora.adapters.vera import VeRA
from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError, CannotFuse
from mlx_lora.store import adapter as store
from mlx_lora.store.arithmetic import thin_svd
from mlx_lora.store.low_rank import Svd, nearest_low_rank
from mlx_lora.store.manifest import Manifest

Array = NDArray[np.float32]
METHODS = ("lora", "dora", "qalora", "vera", "ia3")
BLOCK_ROWS = 1024


@dataclass(frozen=True)
class Module:
    """One adapted module.

    kind         linear, embedding or experts
    a, b         A (r, in) and B (out, r); of experts (E, r, in) and (E, out, r); of an embedding (r, vocabulary) and
                 (dim, r), and its table changes by s·(B A)ᵀ. QA-LoRA's A is (r, in / group_size). None without factors
    scale        s
    extras       `magnitude` (out,) of DoRA; `vera_b` (out,) and `vera_d` (r,); `vector` of IA³
    columns      whether IA³'s vector multiplies inputs
    group_size   QA-LoRA's L, None for the others
    """

    kind: str
    a: Array | None = None
    b: Array | None = None
    scale: float = 1.0
    extras: dict[str, Array] = field(default_factory=dict)
    columns: bool = False
    group_size: int | None = None

    @property
    def rank(self) -> int:
        """r; 0 where the method has none."""
        if self.a is not None:
            return int(self.a.shape[-2])
        return int(self.extras["vera_d"].shape[-1]) if "vera_d" in self.extras else 0


@dataclass(frozen=True)
class Neutral:
    """An adapter of one of METHODS. `modules` are by their paths in the MLX model.

    `shared` has VeRA's frozen pair: `vera_A` (r, largest in) and `vera_B` (largest out, r).
    """

    method: str
    modules: dict[str, Module]
    shared: dict[str, Array] = field(default_factory=dict)


def from_wrappers(wrappers: Wrappers) -> Neutral:
    """An adapter as it was read and checked against its base (`store.adapter.wrappers_for`).

    AdaLoRA's comes out as LoRA. Raises AdapterError naming the module and its method for one that has no such form.
    """
    modules, methods, shared = {}, Counter[str](), {}
    for path, wrapper in wrappers.items():
        method = _method(wrapper, path)
        methods[method] += 1
        modules[path] = _module(wrapper, method)
        if isinstance(wrapper, VeRA):
            a, b = wrapper._pair
            shared = {"vera_A": _array(a.T), "vera_B": _array(b)}
    if len(methods) != 1:
        raise AdapterError(f"an adapter of several methods, {', '.join(methods)}, has no form in other formats")
    return Neutral(next(iter(methods)), modules, shared)


def _method(wrapper: AdapterLayer, path: str) -> str:
    for kind, method in ((DoRA, "dora"), (LoRA, "lora"), (QALoRA, "qalora"), (VeRA, "vera"), (IA3, "ia3")):
        if isinstance(wrapper, kind) and isinstance(wrapper.base, (*LINEARS, *EMBEDDINGS, *EXPERTS)):
            return method
    raise AdapterError(
        f"{path}: {type(wrapper).__name__} on a {type(wrapper.base).__name__} has no form in other formats",
        hint="--as-lora RANK stores the nearest LoRA of a method that changes weights; fuse merges it as it is",
    )


def _module(wrapper: AdapterLayer, method: str) -> Module:
    kind = kind_of(wrapper.base)
    if method in ("lora", "dora"):
        a, b = wrapper.factors()
        a, b = (a, b) if kind == "experts" else (a.T, b.T)
        extras = {"magnitude": _array(wrapper["m"])} if method == "dora" else {}
        return Module(kind, _array(a), _array(b), wrapper.scale, extras)
    if method == "qalora":
        a, b = wrapper["lora_a"], wrapper["lora_b"]
        a, b = (a, b) if kind == "experts" else (a.T, b.T)
        return Module(kind, _array(a), _array(b), wrapper.scale, group_size=wrapper.group_size)
    if method == "vera":
        return Module(kind, extras={name: _array(wrapper[name]) for name in ("vera_b", "vera_d")})
    return Module(kind, extras={"vector": _array(wrapper["vector"])}, columns=wrapper.columns)


def kind_of(layer: Any) -> str:
    """`linear`, `embedding` or `experts`."""
    return "embedding" if isinstance(layer, EMBEDDINGS) else "experts" if isinstance(layer, EXPERTS) else "linear"


def _array(array: mx.array) -> Array:
    return np.array(array.astype(mx.float32))


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
        module = _module(wrapper, "lora")
    elif isinstance(wrapper, QALoRA):
        module = expanded(_module(wrapper, "qalora"))
    elif isinstance(wrapper, VeRA):
        a, b = (_array(part) for part in wrapper.projections())
        vectors = [_array(wrapper[name]) for name in ("vera_b", "vera_d")]
        many = zip(*(vector.reshape(-1, vector.shape[-1]) for vector in vectors), strict=True)
        return [(own_b[:, None] * b, own_d[:, None] * a.T) for own_b, own_d in many]
    else:
        delta = _array(wrapper.delta())
        return list(delta) if delta.ndim == 3 else [delta.T if kind_of(wrapper.base) == "embedding" else delta]
    assert module.a is not None and module.b is not None
    a, b = (array if array.ndim == 3 else array[None] for array in (module.a, module.b))
    return [(np.float32(module.scale) * own_b, own_a) for own_a, own_b in zip(a, b, strict=True)]


def expanded(module: Module) -> Module:
    """QA-LoRA's module as LoRA's, exactly: the mean over a group of L inputs is a factor whose columns repeat, over L.

    A of (r, in / L) becomes (r, in).
    """
    assert module.a is not None and module.group_size is not None
    a = np.repeat(module.a, module.group_size, axis=-1) / np.float32(module.group_size)
    return replace(module, a=a, group_size=None)


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


def to_store(
    neutral: Neutral, out: Path, known: Manifest, layers: int, *, shapes: dict[str, tuple[int, ...]], force: bool
) -> Path:
    """Write an adapter directory of ours; `known` says what the arrays don't: base, template, data, parents.

    `layers` is the model's number of layers, `shapes` the unpacked shapes of its weights by path. Factors that bfloat16
    can't hold exactly stay float32, so nothing is rounded. Raises AdapterError naming the modules of another shape.
    """
    _check_shapes(neutral, shapes)
    stored = {path: arrays_of(module, neutral.method) for path, module in neutral.modules.items()}
    scales = {path: module.scale for path, module in neutral.modules.items()}
    first = next(iter(scales.values()))
    precise = {
        f"{path}.{name}"
        for path, named in stored.items()
        for name, array in named.items()
        if scales[path] != first or not mx.array_equal(array, array.astype(mx.bfloat16).astype(mx.float32)).item()
    }
    manifest = known.model_copy(
        update={
            "method": neutral.method,
            "adapter": settings_of(neutral).model_dump(),
            "modules": list(neutral.modules),
            "scales": scales,
        }
    )
    return store.write(out, stored, scales, manifest, layers, precise=precise, shared=neutral.shared, force=force)


def settings_of(neutral: Neutral) -> Adapter:
    """The adapter's section of a recipe that says these modules, ranks and scales."""
    paths = list(neutral.modules)
    if neutral.method == "ia3":
        return Adapter(method="ia3", targets=paths)
    ranks = {path: module.rank for path, module in neutral.modules.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others: dict[str, Any] = {re.escape(path): rank for path, rank in ranks.items() if rank != usual}
    if neutral.method == "vera":
        return Adapter(method="vera", rank=usual, targets=paths)
    alphas = {path: module.scale * module.rank for path, module in neutral.modules.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    own: dict[str, Any] = {re.escape(path): value for path, value in alphas.items() if value != alpha}
    return Adapter(
        method=neutral.method, rank=usual, alpha=alpha, targets=paths, rank_pattern=others, alpha_pattern=own
    )


def _check_shapes(neutral: Neutral, shapes: dict[str, tuple[int, ...]]) -> None:
    faults = []
    for path, module in neutral.modules.items():
        shape = shapes.get(path)
        if shape is None:
            faults.append(f"the base has no {path} that an adapter can be on")
        elif module.a is not None and module.b is not None:
            inputs = module.a.shape[-1] * (module.group_size or 1)
            found = (*module.a.shape[:-2], module.b.shape[-2], inputs)
            expected = shape[::-1] if module.kind == "embedding" else shape
            faults += [] if found == expected else [f"{path} is for a weight {found}, the base's is {expected}"]
    if faults:
        more = f"\n  … and {len(faults) - 12} more" if len(faults) > 12 else ""
        raise AdapterError(
            "the adapter doesn't fit the base:\n  " + "\n  ".join(faults[:12]) + more, hint="is this the right base?"
        )


def shapes_of(modules: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The unpacked shapes (out, in), (vocabulary, dim) or (E, out, in) of a bare model's adaptable modules by path."""
    return {path: layer_shape(m) for path, m in modules.items() if isinstance(m, (*LINEARS, *EMBEDDINGS, *EXPERTS))}


def arrays_of(module: Module, method: str) -> dict[str, mx.array]:
    """A module's arrays by their names in our files."""
    if method in ("vera", "ia3"):
        return {name: mx.array(array) for name, array in module.extras.items()}
    assert module.a is not None and module.b is not None
    a, b = (module.a, module.b) if module.kind == "experts" else (module.a.T, module.b.T)
    arrays = {"lora_a": mx.array(np.ascontiguousarray(a)), "lora_b": mx.array(np.ascontiguousarray(b))}
    return arrays | ({"m": mx.array(module.extras["magnitude"])} if method == "dora" else {})
