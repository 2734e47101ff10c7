"""An adapter between formats: every module with its true rank and scale, float32, as numpy arrays.

mlx-lm's files have one rank and one scale for all modules, PEFT's name patterns, GGUF's take the rank from the arrays.
What is common to all of them is here, and every format is a pair of functions to and from it. Factors are oriented as
in the papers and in PEFT, ΔW = s·B A with A (r, in) and B (out, r).

`from_wrappers` reads an adapter that was checked against its base; methods without such a form are refused by name.
`to_store` writes an adapter of ours. `nearest_lora.py` finds the nearest LoRA of any method that changes weights.
"""

from __future__ import annotations

import re
from collections import Counter
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
from mlx_lora.errors import AdapterError
from mlx_lora.store import adapter as store
from mlx_lora.store.manifest import Manifest

Array = NDArray[np.float32]
METHODS = ("lora", "dora", "qalora", "vera", "ia3")


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
        modules[path] = module_of(wrapper, method)
        if isinstance(wrapper, VeRA):
            a, b = wrapper._pair
            shared = {"vera_A": as_numpy(a.T), "vera_B": as_numpy(b)}
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


def module_of(wrapper: AdapterLayer, method: str) -> Module:
    """The module that a wrapper of one of METHODS holds."""
    kind = kind_of(wrapper.base)
    if method in ("lora", "dora"):
        a, b = wrapper.factors()
        a, b = (a, b) if kind == "experts" else (a.T, b.T)
        extras = {"magnitude": as_numpy(wrapper["m"])} if method == "dora" else {}
        return Module(kind, as_numpy(a), as_numpy(b), wrapper.scale, extras)
    if method == "qalora":
        a, b = wrapper["lora_a"], wrapper["lora_b"]
        a, b = (a, b) if kind == "experts" else (a.T, b.T)
        return Module(kind, as_numpy(a), as_numpy(b), wrapper.scale, group_size=wrapper.group_size)
    if method == "vera":
        return Module(kind, extras={name: as_numpy(wrapper[name]) for name in ("vera_b", "vera_d")})
    return Module(kind, extras={"vector": as_numpy(wrapper["vector"])}, columns=wrapper.columns)


def kind_of(layer: Any) -> str:
    """`linear`, `embedding` or `experts`."""
    return "embedding" if isinstance(layer, EMBEDDINGS) else "experts" if isinstance(layer, EXPERTS) else "linear"


def as_numpy(array: mx.array) -> Array:
    """The array in float32."""
    return np.array(array.astype(mx.float32))


def expanded(module: Module) -> Module:
    """QA-LoRA's module as LoRA's, exactly: the mean over a group of L inputs is a factor whose columns repeat, over L.

    A of (r, in / L) becomes (r, in).
    """
    assert module.a is not None and module.group_size is not None
    a = np.repeat(module.a, module.group_size, axis=-1) / np.float32(module.group_size)
    return replace(module, a=a, group_size=None)


def to_store(
    neutral: Neutral,
    out: Path,
    known: Manifest,
    layers: int,
    *,
    shapes: dict[str, tuple[int, ...]],
    chat_template: str | None = None,
    force: bool,
) -> Path:
    """Write an adapter directory of ours; `known` says what the arrays don't: base, template, data, parents.

    `layers` is the model's number of layers, `chat_template` the adapter's own where it has one, and `shapes` are the
    unpacked shapes of the model's weights by path. Factors that bfloat16 can't hold exactly stay float32, so nothing is
    rounded. Raises AdapterError naming the modules of another shape.
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
    return store.write(
        out, stored, scales, manifest, layers, precise=precise, shared=neutral.shared, chat_template=chat_template,
        force=force,
    )  # fmt: skip


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
    more: dict[str, Any] = {"zero_points": "float32"} if neutral.method == "qalora" else {}  # not trained through ours
    return Adapter(
        method=neutral.method, rank=usual, alpha=alpha, targets=paths, rank_pattern=others, alpha_pattern=own, **more
    )


def usable(neutral: Neutral) -> Neutral:
    """The adapter with all scales above zero, a sign going into B. Raises AdapterError for updates beyond float32."""
    return replace(neutral, modules={path: _usual_scale(path, each) for path, each in neutral.modules.items()})


def _usual_scale(path: str, module: Module) -> Module:
    """The module with a scale above zero. Raises AdapterError where s·B is too large for float32."""
    if module.b is None:
        return module
    with np.errstate(over="ignore"):
        if not np.isfinite(np.float32(module.scale) * module.b * np.float32(1e6)).all():
            raise AdapterError(f"{path}: its update, of scale {module.scale:.3g}, is beyond any that a model can use")
    if module.scale > 0:
        return module
    return replace(module, b=np.float32(module.scale) * module.b, scale=1.0)


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
