"""A LoRA adapter as a GGUF file for llama.cpp, and back.

A file has one alpha, and of every module a pair `<tensor>.lora_a` (r, in) and `<tensor>.lora_b` (out, r), of experts
(E, r, in) and (E, out, r). llama.cpp adds alpha / r · B A x, with the pair's own r. So a module with another alpha is
scaled in its B. Where llama.cpp wants a weight's rows in another order, those of B are in that order. The embedding's
pair is transposed: (vocabulary, r) and (dim, r).

What such a file can't say is refused by the module's name: methods other than LoRA, and an embedding that is the output
head too, because llama.cpp uses the pair as it is at both ends and it fits one of them.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from mlx_lora.errors import AdapterError
from mlx_lora.interop.gguf.plan import Plan, plan_of
from mlx_lora.interop.gguf.writing import write_header
from mlx_lora.interop.neutral import Array, Module, Neutral, expanded
from mlx_lora.models.gguf.header import Fields, Stored
from mlx_lora.models.gguf.reader import open_gguf
from mlx_lora.models.gguf.tensors import Tensor
from mlx_lora.models.open import Model, open_model

ADAPTED = ("linear", "embedding", "experts")
AS_LORA = "--as-lora RANK stores the nearest LoRA and says how far it is; --fused merges all of it"
FUSED = "--fused merges all of it into a whole model"


def write_adapter(neutral: Neutral, plan: Plan, out: Path, *, about: Fields | None = None) -> Path:
    """Write a GGUF adapter for the base of `plan`; `about` is metadata to add. An existing file is replaced.

    QA-LoRA's modules become LoRA's exactly. Raises AdapterError as `check` does.
    """
    check(neutral, plan)
    modules = {path: _as_lora(module) for path, module in neutral.modules.items()}
    alphas = Counter(module.scale * module.rank for module in modules.values())
    alpha = alphas.most_common(1)[0][0]
    pairs: dict[str, Array] = {}
    for tensor in plan:
        if tensor.parameter == "weight" and (module := modules.get(tensor.path)) is not None:
            a, b = _to_file(tensor, module, alpha)
            pairs |= {f"{tensor.name}.weight.lora_a": a, f"{tensor.name}.weight.lora_b": b}
    fields = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(alpha)} | (about or {})
    writer = gguf.GGUFWriter(out, plan.architecture)
    for name, array in pairs.items():
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
    write_header(writer, fields)
    for array in pairs.values():
        writer.write_tensor_data(array)
    writer.close()
    return out


def check(neutral: Neutral, plan: Plan) -> None:
    """Raise one AdapterError for all that a GGUF adapter can't say of this one."""
    if neutral.method not in ("lora", "qalora"):
        raise AdapterError(
            f"llama.cpp has no adapters of method {neutral.method}, only LoRA",
            hint=FUSED if neutral.method == "ia3" else AS_LORA,
        )
    faults = []
    for path, module in neutral.modules.items():
        tensor = plan.weight(path)
        if tensor is None or tensor.kind not in ADAPTED:
            faults.append(f"{path}: llama.cpp has no adapter for it")
        elif module.kind == "embedding" and plan.tied:
            faults.append(f"{path}: it is the output head too, and llama.cpp can't change both ends by one adapter")
    if faults:
        more = f"\n  … and {len(faults) - 12} more" if len(faults) > 12 else ""
        raise AdapterError("\n  ".join(faults[:12]) + more, hint=FUSED)


def _as_lora(module: Module) -> Module:
    return module if module.group_size is None else expanded(module)


def _to_file(tensor: Tensor, module: Module, alpha: float) -> tuple[Array, Array]:
    assert module.a is not None and module.b is not None
    own = module.scale * module.rank
    b = module.b if own == alpha else module.b * np.float32(own / alpha)
    a = module.a.T if module.kind == "embedding" else module.a
    b = tensor.rows_to_gguf(b)
    return np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)


def read_adapter(file: Path, model: Model) -> Neutral:
    """A GGUF adapter for the base `model`, whose config.json says the paths and shapes of its modules.

    Raises AdapterError for another architecture, a kind that isn't LoRA, and all tensors that are unknown, alone or of
    a wrong shape; ModelError for a damaged file and for an architecture that isn't known here.
    """
    plan = plan_of(open_model(model).config)
    source = open_gguf(Path(file))
    alpha = _alpha(file, source.fields, plan)
    arrays = dict(source.tensors)
    faults, modules = [], {}
    for tensor in plan:
        names = [f"{tensor.name}.weight.lora_{side}" for side in "ab"] if tensor.kind in ADAPTED else []
        found = [_values(arrays.pop(name)) for name in names if name in arrays]
        if len(found) == 1:
            faults.append(f"{tensor.name}.weight has one factor and not the other")
        elif found and (fault := _misfit(tensor, *found)):
            faults.append(f"{tensor.name}.weight {fault}")
        elif found:
            modules[tensor.path] = _from_file(tensor, found[0], found[1], alpha)
    faults += [f"{name} is unknown" for name in arrays]
    if faults or not modules:
        listed = "\n  ".join(faults[:12] or ["it has no tensors"])
        raise AdapterError(f"{file}: the adapter doesn't fit the base:\n  {listed}", hint="is this the right base?")
    return Neutral("lora", modules)


def _alpha(file: Path, fields: Fields, plan: Plan) -> float:
    kind, architecture = fields.get("general.type"), fields.get("general.architecture")
    if kind != "adapter":
        raise AdapterError(f"{file}: a GGUF file of type {kind!r}, not an adapter")
    if fields.get("adapter.type") != "lora":
        raise AdapterError(f"{file}: an adapter of type {fields.get('adapter.type')!r}; known: lora")
    if fields.get("adapter.alora.invocation_tokens"):
        raise AdapterError(f"{file}: an activated adapter (adapter.alora.invocation_tokens), which isn't known here")
    if architecture != plan.architecture:
        raise AdapterError(f"{file}: an adapter for architecture {architecture!r}, the base's is {plan.architecture!r}")
    alpha = fields.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, int | float) or not np.isfinite(alpha):
        raise AdapterError(f"{file}: adapter.lora.alpha is {alpha!r}, not a number")
    return float(alpha)


def _values(tensor: Stored) -> Array:
    values: Any = gguf.quants.dequantize(np.array(tensor.data), tensor.kind)
    return np.asarray(values, np.float32)


def _misfit(tensor: Tensor, a: Array, b: Array) -> str | None:
    """What is wrong with a pair, or None."""
    *leading, rows, columns = tensor.shape
    if tensor.kind == "embedding":
        expected: tuple[tuple[int, ...], ...] = ((rows, a.shape[-1]), (columns, a.shape[-1]))
    else:
        rank = a.shape[-2] if a.ndim > 1 else 0
        expected = ((*leading, rank, columns), (*leading, rows, rank))
    if (a.shape, b.shape) != expected:
        return f"has factors {a.shape} and {b.shape}, which don't fit a weight {tensor.shape}"
    return None if np.isfinite(a).all() and np.isfinite(b).all() else "has factors with NaN or infinity"


def _from_file(tensor: Tensor, a: Array, b: Array, alpha: float) -> Module:
    a = np.ascontiguousarray(a.T) if tensor.kind == "embedding" else a
    rank = a.shape[-2]
    # llama.cpp takes an alpha of 0 for no scaling
    return Module(tensor.kind, a, np.ascontiguousarray(tensor.rows_to_mlx(b)), alpha / rank if alpha else 1.0)
