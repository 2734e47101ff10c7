"""The card of an exported model: a README.md with what it was made of, and how it was checked.

It says what a reader needs to judge and to repeat the model, and nothing of the training rows but their number and
their hash. Of the base's licence it says what the base's own files say, and never guesses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_lora import __version__, files
from mlx_lora.errors import ModelError
from mlx_lora.store.manifest import Manifest

CARD = "README.md"
UNKNOWN_LICENCE = "unknown: see the base"
# Figures of a run by their names in a manifest.
METRICS = {
    "iters": "steps", "trained_tokens": "trained tokens", "train_loss": "training loss",
    "valid_loss": "validation loss", "best_valid_loss": "best validation loss",
}  # fmt: skip
# Settings of a recipe that say how it was trained; the others are about this machine, or about files.
SETTINGS = {
    "adapter": ("rank", "alpha", "dropout", "targets", "layers", "init"),
    "train": ("epochs", "iters", "batch_size", "grad_accumulation", "learning_rate", "schedule", "optimizer"),
    "data": ("format", "template", "mask", "max_seq_length"),
}
_LICENCE_FILES = re.compile(r"(?i)(un)?licen[cs]e(\.(txt|md))?|copying")


def card(
    manifest: Manifest,
    *,
    name: str,
    form: str,
    base: Path | None = None,
    checked: Sequence[str] = (),
    use: Sequence[str] = (),
) -> str:
    """The card as Markdown, with front matter in YAML.

    `form` says what the artefact is ("MLX model, fused"), `base` is the base's directory, for its licence; `checked`
    and `use` are sentences on how it was checked and how it is run.
    """
    licence = licence_of(base) if base else UNKNOWN_LICENCE
    parts = [
        "\n".join(_front_matter(manifest, licence)),
        f"# {_line(name)}",
        f"{form}, made by mlx-lora {__version__} from the base `{_line(_base(manifest))}` and a trained adapter.",
        _list("Use", use),
        _list("Training", [f"{label}: {value}" for label, value in _training(manifest)]),
        _list("Data", [f"{label}: {value}" for label, value in _data(manifest)]),
        _list("Figures", [f"{label}: {value}" for label, value in _figures(manifest)]),
        _list("Check", checked or ["what was written was not compared with base and adapter"]),
        f"## Licence\n\nLicence of the base: {_line(licence)}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def said_of(report: Mapping[str, Any]) -> list[str]:
    """Lines on how an artefact was checked, from the keys of its export.json: `check`, or why there is none."""
    check = report.get("check")
    if check is None:
        return [f"what was written was not checked: {report.get('unchecked') or 'nothing was run'}"]
    lines = [
        f"{check['program']}, at {check['positions']} positions: {check['kept']:.0%} (±{check['kept_error']:.0%}) "
        "of the adapter's effect is in it, "
        f"KL to base and adapter {check['kl']:.4f} nats, same top token {check['top1_agreement']:.1%}"
    ]
    if check["quantization_kl"] is not None:
        lines.append(f"the number format alone changes the base by {check['quantization_kl']:.4f} nats")
    return lines


def licence_of(base: Path) -> str:
    """What a model directory's own files say of its licence: its card's front matter, else a licence file's name."""
    try:
        text = files.read_text(base / CARD, ModelError)
    except ModelError:  # it has no card
        text = ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    for key in ("license_name", "license"):
        found = re.search(rf"^{key}:[ \t]*[\"']?([^\"'\n]+?)[\"']?[ \t]*$", front[1] if front else "", re.MULTILINE)
        if found and found[1].strip() not in ("other", "unknown", "[]"):
            return found[1].strip()[:100]
    names = sorted(file.name for file in base.iterdir() if _LICENCE_FILES.fullmatch(file.name))
    return f"see {names[0]} of the base" if names else UNKNOWN_LICENCE


def _front_matter(manifest: Manifest, licence: str) -> Iterator[str]:
    """YAML whose texts are JSON strings, which YAML reads alike."""
    yield "---"
    if manifest.base is not None:
        yield f"base_model: {json.dumps(manifest.base.name)}"
    yield f"license: {json.dumps('other' if licence.startswith(('see ', 'unknown')) else licence)}"
    yield "pipeline_tag: text-generation"
    yield f"tags: {json.dumps(['mlx-lora', manifest.method])}"
    yield "---"


def _base(manifest: Manifest) -> str:
    return manifest.base.name if manifest.base is not None else "not known"


def _training(manifest: Manifest) -> Iterator[tuple[str, Any]]:
    yield "method", manifest.method
    recipe = manifest.recipe or {"adapter": manifest.adapter}
    for section, keys in SETTINGS.items():
        values = recipe.get(section) or {}
        for key in keys:
            if values.get(key) is not None:
                yield f"{section}.{key}", f"`{json.dumps(values[key], ensure_ascii=False)}`"
    if manifest.base is not None:
        yield "base", f"fingerprint `{manifest.base.fingerprint}`" + _packed(manifest.base.quantization)


def _packed(quantization: Mapping[str, Any] | None) -> str:
    if not quantization:
        return ""
    return f", quantized to {quantization.get('bits')} bits ({quantization.get('mode', 'affine')})"


def _data(manifest: Manifest) -> Iterator[tuple[str, str]]:
    for number, file in enumerate(manifest.data, start=1):
        yield f"file {number}", f"{file['rows']} rows, {file['tokens']} tokens, sha256 `{file['sha256']}`"


def _figures(manifest: Manifest) -> Iterator[tuple[str, str]]:
    for key, label in METRICS.items():
        if isinstance(value := manifest.metrics.get(key), int | float):
            yield label, f"{value:.4f}" if isinstance(value, float) else str(value)


def _list(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"## {title}", "", *(f"- {_line(line)}" for line in lines)]) if lines else ""


def _line(text: str) -> str:
    """Text from elsewhere as part of one line."""
    return " ".join(text.split())
