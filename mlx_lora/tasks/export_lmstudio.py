"""Put base and adapter, fused, where LM Studio finds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_lora import paths
from mlx_lora.data.prepare import OnFile, silent
from mlx_lora.interop import lmstudio
from mlx_lora.interop.card import CARD, card
from mlx_lora.serve.conversation import trained
from mlx_lora.store import registry
from mlx_lora.store.adapter import read
from mlx_lora.store.base import base_for
from mlx_lora.tasks.export_check import RECORD, record
from mlx_lora.tasks.fuse import fuse_adapter

# What `fuse` measured, as export.json keeps it.
KEPT = ("bits", "bytes", "delta_survival", "kl", "top1_agreement")


def export_lmstudio(
    model: str | None,
    adapter: str,
    out: Path | None = None,
    *,
    bits: str | None = None,
    data: str | None = None,
    force: bool = False,
    progress: OnFile = silent,
) -> dict[str, Any]:
    """Fuse into `out`, by default LM Studio's own folder, with a model card; measured as `fuse` is.

    Returns `fuse --json`'s keys, `name` (what LM Studio calls it) and `notes`. Raises as `fuse_adapter`, and ModelError
    where LM Studio has no folder here.
    """
    path = registry.find(adapter)
    out = lmstudio.place(path.name) if out is None else out
    paths.check_target(out, force=force)
    measured = fuse_adapter(model, adapter, out, bits=bits, data=data, force=force, progress=progress)
    stored, report = read(path), measured.as_dict()
    check = (
        f"mlx_lm loaded it: {report['delta_survival']:.1%} of the update survived, KL to base and adapter "
        f"{report['kl']:.4f} nats, same top token {report['top1_agreement']:.1%}"
    )
    opened = base_for(model, [stored])
    name = f"{out.resolve().parent.name}/{out.name}"
    use = [f"LM Studio lists it as {name}", *(notes := _notes(trained(stored).system))]
    text = card(
        stored.manifest, name=out.name, form="MLX model, fused", base=opened.path,
        checked=[check], use=use,
    )  # fmt: skip
    with paths.created(out / CARD) as stream:
        stream.write(text.encode())
    record(out / RECORD, "mlx", opened, stored, None, **{key: report[key] for key in KEPT})
    return report | {"name": name, "notes": notes}


def _notes(system: str | None) -> list[str]:
    return [f"it was trained with this system prompt, which LM Studio has to be given: {system}"] if system else []
