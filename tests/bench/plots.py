"""Peak memory and time of a step against sequence length, from the recorded figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PLOTS = {"peak_bytes": ("peak memory (GB)", 1e-9, "memory"), "seconds": ("seconds per step", 1.0, "time")}
STYLES = {"ours": "-o", "ours, checkpointing": "--o", "mlx_lm": "-s", "mlx_lm, checkpointing": "--s"}
BASES = {"float32": "float32 base", "4-bit": "4-bit base"}
COLOURS = {"ours": "tab:blue", "mlx_lm": "tab:orange"}


def draw(records: dict[str, dict[str, Any]], folder: Path) -> None:
    """One file for memory and one for time, a panel for each base. Draws nothing that wasn't measured."""
    if "length" not in records:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = records["length"]["figures"]["bases"]
    for key, (label, factor, name) in PLOTS.items():
        figure, axes = pyplot.subplots(1, len(measured), figsize=(5 * len(measured), 3.6), sharey=True, squeeze=False)
        for axis, (base, lengths) in zip(axes[0], measured.items(), strict=True):
            _panel(axis, lengths, key, factor)
            axis.set(title=BASES[base], xlabel="positions")
            for scale, side in ((axis.set_xscale, axis.xaxis), (axis.set_yscale, axis.yaxis)):
                scale("log", base=2)
                side.set_major_formatter(lambda value, _: f"{value:g}")
            axis.grid(alpha=0.3)
        axes[0][0].set_ylabel(label)
        axes[0][0].legend()
        figure.tight_layout()
        figure.savefig(folder / f"length-{name}.png", dpi=120, metadata={"Software": None})
        pyplot.close(figure)


def _panel(axis: Any, lengths: dict[str, dict[str, Any]], key: str, factor: float) -> None:
    for label, style in STYLES.items():
        points = [(int(length), sides[label][key] * factor) for length, sides in lengths.items() if label in sides]
        if points:
            axis.plot(*zip(*points, strict=True), style, label=label, color=COLOURS[label.split(",")[0]])
