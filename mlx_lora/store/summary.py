"""An adapter's manifest in a few lines for people. Reads no weights; the whole is what `--json` prints."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from mlx_lora import methods, paths, ui
from mlx_lora.store.manifest import Manifest, read_manifest

LAYER = re.compile(r"(?:^|\.)(\d+)\.")
LOSSES = (("train_loss", "train"), ("valid_loss", "validation"), ("best_valid_loss", "best validation"))


def summary(path: Path) -> list[tuple[str, str]]:
    """(label, text) of what is known of the adapter at `path`. Raises AdapterError where its manifest can't be read."""
    manifest = read_manifest(path)
    losses = [f"{name} {manifest.metrics[key]:.4f}" for key, name in LOSSES if manifest.metrics.get(key) is not None]
    lines = [
        ("name", path.name),
        ("method", manifest.method),
        ("rank", _rank(manifest)),
        ("scale", ", ".join(f"{scale:g}" for scale in sorted(set(manifest.scales.values()) - {0.0}))),
        ("targets", targets(manifest.modules)),
        ("base", _base(manifest)),
        ("template", manifest.template),
        ("data", "; ".join(f"{each['file']}: {each['rows']} rows, {each['tokens']} tokens" for each in manifest.data)),
        ("loss", ", ".join(losses)),
        ("steps", str(manifest.metrics.get("iters") or "")),
        ("parents", ", ".join(manifest.parents)),
        ("created", manifest.created),
        ("size", ui.size(paths.directory_bytes(path))),
    ]
    return [(label, text) for label, text in lines if text]


def targets(modules: Iterable[str]) -> str:
    """Module paths by the layers they are in: `q_proj, v_proj × 30 layers; lm_head`."""
    layers: dict[str, set[int]] = defaultdict(set)
    for module in modules:
        found = LAYER.search(module)
        layers[module[found.end() :] if found else module].update([int(found[1])] if found else [])
    last = [place.rpartition(".")[2] for place in layers]
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for place, indices in layers.items():
        name = place.rpartition(".")[2]
        groups[tuple(sorted(indices))].append(name if last.count(name) == 1 else place)
    return "; ".join(", ".join(sorted(names)) + _layers(indices) for indices, names in groups.items())


def _layers(indices: tuple[int, ...]) -> str:
    if not indices:
        return ""
    if len(indices) == 1:
        return f" in layer {indices[0]}"
    first, last = indices[0], indices[-1]
    part = f", {first} to {last}" if first and last - first == len(indices) - 1 else ""
    return f" × {len(indices)} layers{part}"


def _rank(manifest: Manifest) -> str:
    if not set(methods.parts(manifest.method)).intersection(methods.LOW_RANK):
        return ""
    others = sorted(set(manifest.adapter.get("rank_pattern", {}).values()) - {manifest.adapter["rank"]})
    return f"{manifest.adapter['rank']}" + (f", for some {', '.join(map(str, others))}" if others else "")


def _base(manifest: Manifest) -> str:
    if manifest.base is None:
        return "not known: trained by another program"
    packed = manifest.base.quantization
    bits = f", {packed.get('bits')} bits" if packed else ""
    return f"{manifest.base.name}{bits} ({manifest.base.fingerprint[:12]})"
