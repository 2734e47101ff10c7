"""How much of the space that one adapter works in another one shares, as in §7 of the LoRA paper (arXiv 2106.09685).

    φ(A₁, A₂, i, j) = ‖U₁ⁱᵀ U₂ʲ‖²_F / min(i, j) ∈ [0, 1]   (eq. 4), U the right-singular vectors of A (or left of B)
    amplification   = ‖ΔW‖_F / ‖Uᵀ W Vᵀ‖_F                 (§7.3), U and V the singular vectors of ΔW

1 means that the first i directions of one lie within the first j of the other. Two random spaces share a little too:
every φ has a Gaussian control of its shape beside it. Ranks may differ, and so may bases: only modules are compared
that both adapters have with the same number of inputs (for B: outputs).

The vectors are A's own (or B's) for LoRA, DoRA and QA-LoRA. They are ΔW's right (or left) ones where a factor alone
says little: AdaLoRA's P and Q are kept orthonormal and its Λ orders them; an adapter begun by PiSSA or OLoRA is stored
with the first factors subtracted, at twice its rank. ΔW is never formed.
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
FACTORS = ("a", "b")
DIFFERENCES = ("pissa", "olora")
# Singular values below this, relative to the first, are rounding: ΔW has no such direction.
NEGLIGIBLE = 1e-6
COLUMN, ROW = 3.4, 3.0  # inches of a panel


@dataclass(frozen=True)
class Overlap:
    """One module: φ of two adapters and of two Gaussian matrices of the same shapes, both (r₁, r₂).

    `amplification` has one number for each adapter, None where nothing was learned. Of experts, everything is the mean.
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
    """φ for every module that both adapters have, of their factors A or B; `seed` draws the Gaussian control.

    With their base as `model`, packed or not, also the amplification factors. Raises AdapterError where the methods
    have no factors, and where no module has the same shape in both.
    """
    theirs = set(modules_of(second))
    shared = [path for path in modules_of(first) if path in theirs]
    layers = None if model is None else dict(model.named_modules())
    if layers is not None:
        _check_measurable([first, second], shared, layers)
    found = []
    for path in shared:
        pair = directions(first, path, of), directions(second, path, of)
        if pair[0].shape[:2] != pair[1].shape[:2]:
            continue
        phi = np.mean([similarity(*vectors) for vectors in zip(*pair, strict=True)], axis=0)
        factor = None
        if layers is not None:
            factor = amplification(first, path, layers[path]), amplification(second, path, layers[path])
        found.append(Overlap(path, phi, _control(path, pair, seed), factor))
    if not found:
        raise AdapterError(
            f"{first.name} and {second.name} share no module of the same shape",
            hint="compare adapters that were trained on the same targets of the same base",
        )
    return found


def directions(adapter: StoredAdapter, path: str, of: str) -> Array:
    """Singular vectors as columns, strongest first: of the inputs for `a` (E, in, r), the outputs for `b`."""
    a, b = factors(adapter, path)
    if adapter.manifest.method == "adalora" or _init(adapter) in DIFFERENCES:
        whole = [thin_svd(*pair) for pair in zip(a, b, strict=True)]
        return np.stack([part.u if of == "a" else part.vt.T for part in whole])
    u, _, _ = np.linalg.svd(a if of == "a" else b.swapaxes(1, 2), full_matrices=False)
    return u


def _init(adapter: StoredAdapter) -> Any:
    """How the factors began: the recipe says it, the settings of a stored adapter say what its arrays are now."""
    return ((adapter.manifest.recipe or {}).get("adapter") or {}).get("init") or adapter.manifest.adapter.get("init")


def _control(path: str, pair: tuple[Array, Array], seed: int) -> Array:
    """φ of two Gaussian matrices of the module's shapes, drawn for this module."""
    generator = np.random.default_rng([seed, zlib.crc32(path.encode())])
    drawn = [np.linalg.svd(generator.standard_normal(each.shape[1:]), full_matrices=False)[0] for each in pair]
    return similarity(*drawn)


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
    if isinstance(layer, EMBEDDINGS):  # the factors' product is ΔW there, and ΔWᵀ elsewhere
        weight = weight.swapaxes(1, 2)
    a, b = factors(adapter, path)
    group = weight.shape[2] // a.shape[1]  # QA-LoRA sees means over groups of inputs
    a = np.repeat(a, group, axis=1) / group
    if (len(weight), *weight.shape[:0:-1]) != (len(a), a.shape[1], b.shape[2]):
        raise AdapterError(f"{adapter.name}: {path} has another shape in this model", hint="is this the right base?")
    found = [_amplified(*matrices) for matrices in zip(a, b, weight, strict=True)]
    known = [factor for factor in found if factor is not None]
    return float(np.mean(known)) if known else None


def _amplified(a: Array, b: Array, weight: Array) -> float | None:
    """One matrix: a (in, r), b (r, out), weight (out, in)."""
    delta = thin_svd(a, b)
    rank = int((delta.s > NEGLIGIBLE * delta.s[0]).sum())
    projected = float(np.linalg.norm(delta.vt[:rank] @ weight @ delta.u[:, :rank]))
    return float(np.linalg.norm(delta.s)) / projected if projected else None


def mean(overlaps: Sequence[Overlap]) -> tuple[Array, Array]:
    """φ and its control, averaged over modules; where ranks differ, as far as all of them go."""
    rows, columns = np.min([overlap.phi.shape for overlap in overlaps], axis=0)
    both = [(overlap.phi[:rows, :columns], overlap.random_phi[:rows, :columns]) for overlap in overlaps]
    phi, control = np.mean(both, axis=0)
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
    """Modules of the same name together (q_proj, v_proj, …), in the order of their first appearance."""
    groups: dict[str, list[Overlap]] = {}
    for overlap in overlaps:
        groups.setdefault(overlap.module.rpartition(".")[2], []).append(overlap)
    return groups


def layer_of(path: str) -> int:
    """The number of the layer that a module is in; 0 for one outside of them."""
    found = re.search(r"\.(\d+)\.", f".{path}.")
    return int(found[1]) if found else 0


def check_drawing(out: Path) -> None:
    """Raise MlxLoraError unless a picture can be drawn to `out`; worth knowing before the work."""
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
    """One panel; returns the image that the scale belongs to."""
    image = axis.imshow(np.zeros((1, 1)) if panel is None else panel, vmin=0, vmax=top, cmap="viridis", aspect="auto")
    if panel is None:
        axis.set_visible(False)
        return image
    axis.set_title(f"{title}\nφ(1, 1) = {panel[0, 0]:.2g}", fontsize=9, parse_math=False)
    for size, place in ((panel.shape[1], axis.xaxis), (panel.shape[0], axis.yaxis)):
        shown = sorted({1, size, *range(0, size, max(1, math.ceil(size / 8)))} - {0})
        place.set_ticks([index - 1 for index in shown], labels=[str(index) for index in shown], fontsize=8)
    return image


def _plain(text: str) -> str:
    """Text that any font has and that starts no formula; a directory may have any name."""
    return text.encode("ascii", "replace").decode().replace("$", r"\$")
