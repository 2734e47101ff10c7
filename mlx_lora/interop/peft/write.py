"""`Neutral` as a PEFT adapter directory, in the names and the shapes that PEFT itself writes for transformers' model.

Every module is a target by its whole path, and has its own rank and alpha where they differ from most. lora_alpha is
s·r, or s·√r as use_rslora where only that gives whole numbers, and always the number from which PEFT computes s again.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora import paths
from mlx_lora.errors import AdapterError
from mlx_lora.interop.neutral import Array, Module, Neutral
from mlx_lora.interop.peft.config import CONFIG, WEIGHTS
from mlx_lora.interop.peft.experts import joined, stacked
from mlx_lora.interop.peft.names import TURNS, Names
from mlx_lora.interop.peft.read import regrouped
from mlx_lora.store.fitting import listed

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Entry:
    """A target's `arrays` by the end of their names, its rank and its scale."""

    arrays: dict[str, Array]
    rank: int
    scale: float


def write(
    neutral: Neutral, out: Path, names: Names, *, base: str | None, texts: Mapping[str, str] | None = None,
    force: bool = False,
) -> Path:  # fmt: skip
    """Write the directory `out` whole or not at all: configuration, tensors, and `texts` by the names of their files.

    `base` is what the configuration names as the base. Raises one AdapterError for all that PEFT has no form for,
    before anything is written.
    """
    settings, tensors = encode(neutral, names)
    settings = {"base_model_name_or_path": base, "task_type": "CAUSAL_LM", "inference_mode": True, **settings}
    exact = all(_is_half(array) for array in tensors.values())
    stored = {name: array.astype(mx.bfloat16 if exact else mx.float32) for name, array in tensors.items()}
    with paths.written_whole(out, force=force) as folder:
        with paths.created(folder / WEIGHTS) as stream:
            mx.save_safetensors(stream, stored, metadata={"format": "pt"})
        with paths.created(folder / CONFIG) as stream:
            stream.write((json.dumps(settings, indent=2, sort_keys=True) + "\n").encode())
        for name, text in (texts or {}).items():
            with paths.created(folder / name) as stream:
                stream.write(text.encode())
    return out


def _is_half(array: mx.array) -> bool:
    """Whether bfloat16 holds every value of a float32 array."""
    return bool(mx.array_equal(array, array.astype(mx.bfloat16).astype(mx.float32)).item())


def encode(neutral: Neutral, names: Names) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """The configuration and the tensors, float32. Raises AdapterError as `write` does."""
    encoders: dict[str, Callable[[Neutral, Names], tuple[dict[str, Any], dict[str, Array]]]] = {
        "vera": _vera,
        "ia3": _ia3,
    }
    settings, tensors = encoders.get(neutral.method, _lora)(neutral, names)
    return settings, {name: mx.array(np.ascontiguousarray(array)) for name, array in tensors.items()}


def _targets(neutral: Neutral, names: Names, kinds: tuple[str, ...]) -> dict[str, str]:
    """transformers' path of every module of these kinds. Raises one AdapterError naming those that PEFT can't have."""
    found, faults, hint = {}, [], None
    for path, module in neutral.modules.items():
        try:
            if module.kind not in kinds:
                raise AdapterError(
                    f"{path}: PEFT has no {neutral.method} on {_plural(module.kind)}", hint="--as-lora RANK"
                )
            if module.kind == "embedding" and names.tied():
                raise AdapterError(
                    f"{path}: this base's head is the embedding too, and PEFT's LoRA would be on the input alone",
                    hint="fuse merges it as it is",
                )
            found[path] = names.experts_path(path)[0] if module.kind == "experts" else names.theirs(path)
        except AdapterError as error:
            faults.append(error.message)
            hint = hint or error.hint
    if faults:
        raise AdapterError("PEFT has no form for this adapter:\n  " + listed(list(dict.fromkeys(faults))), hint=hint)
    return found


def _plural(kind: str) -> str:
    return {"linear": "linear layers", "embedding": "embeddings"}.get(kind, kind)


def _lora(neutral: Neutral, names: Names) -> tuple[dict[str, Any], dict[str, Array]]:
    kinds = ("linear", "embedding", "experts") if neutral.method == "lora" else ("linear",)
    theirs = _targets(neutral, names, kinds)
    entries: dict[str, Entry] = {}
    size = 0
    if neutral.method == "qalora":
        size = math.gcd(*(module.group_size or 1 for module in neutral.modules.values()))
    for path, module in neutral.modules.items():
        if module.kind != "experts":
            entries[theirs[path]] = _entry(module, size)
    parameters, tensors = _experts(neutral, names)
    for path, entry in entries.items():
        tensors |= {f"{PREFIX}{path}.{name}": array for name, array in entry.arrays.items()}
    settings = {
        "peft_type": "LORA",
        "target_modules": list(entries),
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        **_ranks({**entries, **parameters}),
    }
    if neutral.method == "dora":
        settings["use_dora"] = True
    if neutral.method == "qalora":
        settings |= {"use_qalora": True, "qalora_group_size": size}
    if parameters:
        settings["target_parameters"] = list(parameters)
    return settings, tensors


def _entry(module: Module, size: int) -> Entry:
    """A linear layer or an embedding; with `size`, QA-LoRA in groups of that many inputs."""
    assert module.a is not None and module.b is not None
    if module.kind == "embedding":
        return Entry({"lora_embedding_A": module.a, "lora_embedding_B": module.b}, module.rank, module.scale)
    scale = module.scale
    if size:
        module = regrouped(module, size)
        assert module.a is not None and module.b is not None
        scale = module.scale / module.a.shape[-1]  # PEFT multiplies a group's mean by the number of groups
    arrays: dict[str, Array] = {"lora_A.weight": module.a, "lora_B.weight": module.b}  # type: ignore[dict-item]
    if "magnitude" in module.extras:
        arrays["lora_magnitude_vector"] = module.extras["magnitude"]
    return Entry(arrays, module.rank, scale)


def _experts(neutral: Neutral, names: Names) -> tuple[dict[str, Entry], dict[str, Array]]:
    """Parameters of stacked experts by path, and their tensors. PEFT wraps gate and up first, and down around them."""
    blocks: dict[str, dict[str, Module]] = {}
    for path, module in neutral.modules.items():
        if module.kind == "experts":
            block, part = names.experts_path(path)
            blocks.setdefault(block, {})[part] = module
    parameters: dict[str, Entry] = {}
    tensors: dict[str, Array] = {}
    for block, parts in blocks.items():
        down = parts.get("down_proj")
        if "gate_proj" in parts or "up_proj" in parts:
            a, b, scale = joined(parts.get("gate_proj"), parts.get("up_proj"), turns=names.kind in TURNS)
            inner = f"{PREFIX}{block}.base_layer" if down else f"{PREFIX}{block}"
            parameters[f"{block}.gate_up_proj"] = Entry({}, a.shape[1], scale)
            tensors |= dict(zip((f"{inner}.lora_A.weight", f"{inner}.lora_B.weight"), stacked(a, b), strict=True))
        if down is not None:
            assert down.a is not None and down.b is not None
            parameters[f"{block}.down_proj"] = Entry({}, down.rank, down.scale)
            outer = f"{PREFIX}{block}.lora_A.weight", f"{PREFIX}{block}.lora_B.weight"
            tensors |= dict(zip(outer, stacked(down.a, down.b), strict=True))
    return parameters, tensors


def _ranks(entries: dict[str, Entry]) -> dict[str, Any]:
    """r, lora_alpha and their patterns, with use_rslora where only that gives whole alphas."""
    plain = {path: alpha_of(entry.scale, float(entry.rank)) for path, entry in entries.items()}
    rooted = {path: alpha_of(entry.scale, math.sqrt(entry.rank)) for path, entry in entries.items()}
    use_rslora = not all(map(_is_whole, plain.values())) and all(map(_is_whole, rooted.values()))
    alphas = rooted if use_rslora else plain
    ranks = {path: entry.rank for path, entry in entries.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        "use_rslora": use_rslora,
    }


def alpha_of(scale: float, divisor: float) -> float:
    """α with α / divisor equal to `scale`: a whole number where there is one, as an int.

    Not every float64 is such a quotient; then α / divisor is the one beside it.
    """
    product = scale * divisor
    near = [round(product), product, math.nextafter(product, math.inf), math.nextafter(product, 0.0)]
    return next((alpha for alpha in near if alpha / divisor == scale), product)


def _is_whole(alpha: float) -> bool:
    return isinstance(alpha, int)


def _vera(neutral: Neutral, names: Names) -> tuple[dict[str, Any], dict[str, Array]]:
    theirs = _targets(neutral, names, ("linear",))
    ranks = {module.rank for module in neutral.modules.values()}
    if len(ranks) > 1:
        raise AdapterError(f"PEFT's VeRA has one rank, and this adapter {len(ranks)}")
    (rank,) = ranks
    shapes = [names.shape(path) for path in neutral.modules]
    inputs, outputs = max(shape[1] for shape in shapes), max(shape[0] for shape in shapes)
    tensors = {
        "base_model.vera_A": neutral.shared["vera_A"][:, :inputs],
        "base_model.vera_B": neutral.shared["vera_B"][:outputs],
    }
    for path, module in neutral.modules.items():
        tensors[f"{PREFIX}{theirs[path]}.vera_lambda_b"] = module.extras["vera_b"]
        tensors[f"{PREFIX}{theirs[path]}.vera_lambda_d"] = module.extras["vera_d"]
    settings = {
        "peft_type": "VERA", "r": rank, "target_modules": list(theirs.values()), "save_projection": True,
        "projection_prng_key": 0, "vera_dropout": 0.0, "bias": "none",
    }  # fmt: skip
    return settings, tensors


def _ia3(neutral: Neutral, names: Names) -> tuple[dict[str, Any], dict[str, Array]]:
    theirs = _targets(neutral, names, ("linear",))
    tensors = {}
    for path, module in neutral.modules.items():
        vector = module.extras["vector"]
        tensors[f"{PREFIX}{theirs[path]}.ia3_l"] = vector[None] if module.columns else vector[:, None]
    settings = {
        "peft_type": "IA3",
        "target_modules": list(theirs.values()),
        "feedforward_modules": [theirs[path] for path, module in neutral.modules.items() if module.columns],
    }
    return settings, tensors
