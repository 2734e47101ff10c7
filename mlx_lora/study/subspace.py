"""How much the subspaces of two adapters' updates overlap, as in §7 of the LoRA paper (arXiv 2106.09685).

    φ(A₁, A₂, i, j) = ‖U₁ⁱᵀ U₂ʲ‖²_F / min(i, j) ∈ [0, 1]   (eq. 4), U the right-singular vectors of A (or left of B)
    amplification   = ‖ΔW‖_F / ‖Uᵀ W Vᵀ‖_F                 (§7.3), U and V the singular vectors of ΔW

For i ≤ j, 1 means that the first i directions of one adapter lie within the first j of the other. Random subspaces
overlap a little too, so every φ is reported with that of two Gaussian matrices of the same shapes, the control. Ranks
and bases may differ: a module is compared if both adapters have it with the same number of inputs (for B: outputs).

For LoRA, DoRA and QA-LoRA the vectors are those of A (or B). For the others they are ΔW's, because one factor alone
says little: AdaLoRA keeps P and Q orthonormal and orders them by Λ, and an adapter that started from PiSSA or OLoRA is
stored with the initial factors subtracted, at twice its rank. ΔW is never formed.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_lora.adapters.base import EMBEDDINGS
from mlx_lora.errors import AdapterError, MlxLoraError
from mlx_lora.quant.quantize import dequantize_layer
from mlx_lora.store.adapter import StoredAdapter
from mlx_lora.store.arithmetic import factors, modules_of, thin_svd

Array = NDArray[Any]
# Inits whose adapters are stored with the initial factors subtracted.
SUBTRACTED = ("pissa", "olora")
# Singular values below this, relative to the first, are rounding errors and not directions of ΔW.
NEGLIGIBLE = 1e-6
COLUMN, ROW = 3.4, 3.0  # inches of a panel


@dataclass(frozen=True)
class Overlap:
    """One module: φ of two adapters and of two Gaussian matrices of the same shapes, both (r₁, r₂).

    `amplification` has one number for each adapter, None where ΔW is zero. For experts, every value is the mean.
    """

    module: str
    phi: Array
    random_phi: Array
    amplification: tuple[float | None, float | None] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The keys of a module in `study subspace --json`."""
        values = {"module": self.module, "phi": self.phi.tolist(), "random_phi": self.random_phi.tolist()}
        return values | ({} if self.amplification is None else {"amplification": list(self.amplification)})


def similarity(first: Array, second: Array) -> Array:
    """φ of orthonormal columns (n, r₁) and (n, r₂): an array (r₁, r₂) with φ(i, j) at [i−1, j−1]."""
    shared = np.square(first.T @ second).cumsum(axis=0).cumsum(axis=1)
    i, j = np.indices(shared.shape) + 1
    return shared / np.minimum(i, j)  # type: ignore[no-any-return]


def subspaces(
    first: StoredAdapter, second: StoredAdapter, *, of: str = "a", seed: int = 0, model: nn.Module | None = None
) -> list[Overlap]:
    """φ of factor A or B for every module that both adapters have; `seed` draws the Gaussian control.

    If `model`, their base, packed or not, is given, also the amplification factors. Raises AdapterError if a method has
    no factors, or if no module has the same shape in both.
    """
    in_second = set(modules_of(second))
    shared = [path for path in modules_of(first) if path in in_second]
    layers = None if model is None else dict(model.named_modules())
    if layers is not None:
        _check_measurable([first, second], shared, layers)
    overlaps = []
    for path in shared:
        pair = directions(first, path, of), directions(second, path, of)
        if pair[0].shape[:2] != pair[1].shape[:2]:
            continue
        phi = np.mean([similarity(*vectors) for vectors in zip(*pair, strict=True)], axis=0)
        factor = None
        if layers is not None:
            factor = amplification(first, path, layers[path]), amplification(second, path, layers[path])
        overlaps.append(Overlap(path, phi, _control(path, pair, seed), factor))
    if not overlaps:
        raise AdapterError(
            f"{first.name} and {second.name} share no module of the same shape",
            hint="compare adapters that were trained on the same targets of the same base",
        )
    return overlaps


def directions(adapter: StoredAdapter, path: str, of: str) -> Array:
    """Singular vectors as columns, strongest first: of the inputs for `a` (E, in, r), the outputs for `b`."""
    a, b = factors(adapter, path)
    if adapter.manifest.method == "adalora" or _init(adapter) in SUBTRACTED:
        deltas = [thin_svd(*pair) for pair in zip(a, b, strict=True)]
        return np.stack([delta.u if of == "a" else delta.vt.T for delta in deltas])
    u, _, _ = np.linalg.svd(a if of == "a" else b.swapaxes(1, 2), full_matrices=False)
    return u


def _init(adapter: StoredAdapter) -> Any:
    """The init that training started from: the recipe's. A stored adapter's settings describe its present arrays."""
    return ((adapter.manifest.recipe or {}).get("adapter") or {}).get("init") or adapter.manifest.adapter.get("init")


def _control(path: str, pair: tuple[Array, Array], seed: int) -> Array:
    """φ of two Gaussian matrices of the module's shapes, drawn for this module."""
    generator = np.random.default_rng([seed, zlib.crc32(path.encode())])
    control = [np.linalg.svd(generator.standard_normal(real.shape[1:]), full_matrices=False)[0] for real in pair]
    return similarity(*control)


def _check_measurable(adapters: Sequence[StoredAdapter], shared: list[str], layers: dict[str, nn.Module]) -> None:
    for adapter in adapters:
        if adapter.manifest.method == "dora":
            raise AdapterError(
                f"{adapter.name}: DoRA rescales the whole weight, so its update is not B A and is not amplified",
                hint="leave --model out, φ needs no base",
            )
    if missing := [path for path in shared if path not in layers]:
        raise AdapterError(f"the model has no layer {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}")


def amplification(adapter: StoredAdapter, path: str, layer: nn.Module) -> float | None:
    """‖ΔW‖_F / ‖Uᵀ W Vᵀ‖_F: how much stronger ΔW is in its own directions than the weight is there. None for ΔW = 0."""
    weight = np.array(dequantize_layer(layer, mx.float32), np.float64)
    weight = weight if weight.ndim == 3 else weight[None]
    if isinstance(layer, EMBEDDINGS):  # an embedding's factors multiply to ΔW, those of other layers to ΔWᵀ
        weight = weight.swapaxes(1, 2)
    a, b = factors(adapter, path)
    group = weight.shape[2] // a.shape[1]  # QA-LoRA's A multiplies means over groups of inputs
    a = np.repeat(a, group, axis=1) / group
    if (len(weight), *weight.shape[:0:-1]) != (len(a), a.shape[1], b.shape[2]):
        raise AdapterError(f"{adapter.name}: {path} has another shape in this model", hint="is this the right base?")
    per_matrix = [_amplified(*matrices) for matrices in zip(a, b, weight, strict=True)]
    nonzero = [factor for factor in per_matrix if factor is not None]
    return float(np.mean(nonzero)) if nonzero else None


def _amplified(a: Array, b: Array, weight: Array) -> float | None:
    """The amplification of one matrix: a (in, r), b (r, out), weight (out, in)."""
    delta = thin_svd(a, b)
    rank = int((delta.s > NEGLIGIBLE * delta.s[0]).sum())
    projected = float(np.linalg.norm(delta.vt[:rank] @ weight @ delta.u[:, :rank]))
    return float(np.linalg.norm(delta.s)) / projected if projected else None


def mean(overlaps: Sequence[Overlap]) -> tuple[Array, Array]:
    """φ and its control, averaged over modules; if ranks differ, cut to the smallest."""
    rows, columns = np.min([overlap.phi.shape for overlap in overlaps], axis=0)
    pairs = [(overlap.phi[:rows, :columns], overlap.random_phi[:rows, :columns]) for overlap in overlaps]
    phi, control = np.mean(pairs, axis=0)
    return phi, control


def report(first: StoredAdapter, second: StoredAdapter, overlaps: Sequence[Overlap], of: str) -> dict[str, Any]:
    """The keys of `study subspace --json`; `random_phi` at the top is the mean of the modules' controls."""
    phi, control = mean(overlaps)
    return {
        "adapters": [first.name, second.name],
        "of": of,
        "modules": [overlap.as_dict() for overlap in overlaps],
        "random_phi": control.tolist(),
        "top": {"phi": float(phi[0, 0]), "random_phi": float(control[0, 0])},
    }


def by_projection(overlaps: Sequence[Overlap]) -> dict[str, list[Overlap]]:
    """Overlaps grouped by the module's name (q_proj, v_proj, …), in the order of first appearance."""
    groups: dict[str, list[Overlap]] = {}
    for overlap in overlaps:
        groups.setdefault(overlap.module.rpartition(".")[2], []).append(overlap)
    return groups


def layer_of(path: str) -> int:
    """The index of the layer that a module is in; 0 for a module outside the layers."""
    match = re.search(r"\.(\d+)\.", f".{path}.")
    return int(match[1]) if match else 0


def check_drawing(out: Path) -> None:
    """Raise MlxLoraError unless a picture can be drawn to `out`; also called before the computation starts."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MlxLoraError("heat maps need matplotlib", hint="pip install 'mlx-lora[plots]'") from None
    if out.suffix.lower() != ".png":
        raise MlxLoraError(f"{out}: heat maps are PNG", hint=f"--out {out.with_suffix('.png')}")
    if not out.parent.is_dir() or out.is_dir():
        raise MlxLoraError(f"{out} can't be written: {'it is' if out.is_dir() else 'there is no'} directory")


def draw(overlaps: Sequence[Overlap], names: tuple[str, str], out: Path, *, of: str = "a") -> None:
    """Heat maps of φ as one PNG: a row for each projection, the first and the second half of the layers, the control.

    A panel is the mean over its modules, i down and j to the right, all on one scale.
    """
    check_drawing(out)
    from matplotlib.figure import Figure

    layers = sorted({layer_of(overlap.module) for overlap in overlaps})
    half = math.ceil(len(layers) / 2)
    columns = [columns for columns in (layers[:half], layers[half:]) if columns]
    groups = by_projection(overlaps)
    panels = {name: _panels(group, columns) for name, group in groups.items()}
    top = max(panel.max() for row in panels.values() for _, panel in row if panel is not None)
    top = max(math.ceil(top * 10) / 10, 0.1)
    size = (COLUMN * (len(columns) + 1) + 1.0, ROW * len(groups) + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(groups), len(columns) + 1, squeeze=False)
    for row, (name, shown) in zip(axes, panels.items(), strict=True):
        for axis, (title, panel) in zip(row, shown, strict=True):
            image = _heat(axis, f"{name}, {title}", panel, top)
    figure.colorbar(image, ax=axes, shrink=min(1.0, 2.5 / len(groups)), label="φ(i, j)")
    figure.suptitle(f"φ(i, j): directions of {of.upper()} that two adapters share, mean over layers", fontsize=11)
    figure.supxlabel(f"j, directions of {_plain(names[1])}", fontsize=9)
    figure.supylabel(f"i, directions of {_plain(names[0])}", fontsize=9)
    figure.savefig(out, format="png", dpi=120, metadata={"Software": None})


def _panels(group: list[Overlap], columns: list[list[int]]) -> list[tuple[str, Array | None]]:
    """Title and mean φ of each half of the layers, then the control; None where a half has no such module."""
    panels: list[tuple[str, Array | None]] = []
    for layers in columns:
        inside = [overlap for overlap in group if layer_of(overlap.module) in layers]
        title = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}–{layers[-1]}"
        panels.append((title, mean(inside)[0] if inside else None))
    return [*panels, ("Gaussian control", mean(group)[1])]


def _heat(axis: Any, title: str, panel: Array | None, top: float) -> Any:
    """Draw one panel; returns its image, from which the colour bar is made."""
    image = axis.imshow(np.zeros((1, 1)) if panel is None else panel, vmin=0, vmax=top, cmap="viridis", aspect="auto")
    if panel is None:
        axis.set_visible(False)
        return image
    axis.set_title(f"{title}\nφ(1, 1) = {panel[0, 0]:.2g}", fontsize=9, parse_math=False)
    for size, place in ((panel.shape[1], axis.xaxis), (panel.shape[0], axis.yaxis)):
        ticks = sorted({1, size, *range(0, size, max(1, math.ceil(size / 8)))} - {0})
        place.set_ticks([index - 1 for index in ticks], labels=[str(index) for index in ticks], fontsize=8)
    return image


def _plain(text: str) -> str:
    """`text` in ASCII with $ escaped: an adapter may have any name, and matplotlib reads $ as a formula."""
    return text.encode("ascii", "replace").decode().replace("$", r"\$")
