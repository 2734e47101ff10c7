"""What an adapter's manifest says of the run it comes from, and what identifies that run wherever its files lie."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_lora.adapters.attach import Wrappers
from mlx_lora.adapters.placement import Placement
from mlx_lora.config import Recipe
from mlx_lora.data.prepare import Prepared
from mlx_lora.machine import device
from mlx_lora.models.chat_format import ChatFormat
from mlx_lora.models.load import LoadedModel
from mlx_lora.store import adapter as store
from mlx_lora.store import fingerprint


def manifest_of(
    recipe: Recipe,
    loaded: LoadedModel,
    prepared: Prepared,
    wrappers: Wrappers,
    base: store.Base,
    placement: Placement,
) -> store.Manifest:
    """The manifest of the adapter to come: with every module's own rank, which a reader needs to build it again."""
    chats = ChatFormat.of(loaded.tokenizer, recipe.data)
    templated = prepared.format != "text" and recipe.data.template != "none" and chats.available
    return store.Manifest(
        method=recipe.adapter.method,
        adapter=placement.config.model_dump(),
        modules=list(wrappers),
        scales={path: wrapper.scale for path, wrapper in wrappers.items()},
        base=base,
        tokenizer=fingerprint.of_tokenizer(loaded.path),
        chat_template=fingerprint.of_template(chats),
        template="chat" if templated else "none",
        thinking=prepared.thinking,
        answer_end=None if chats.own_end is None else loaded.tokenizer.convert_ids_to_tokens(chats.own_end),
        recipe=shareable(recipe, base),
        data=prepared.files,
    )


def shareable(recipe: Recipe, base: store.Base) -> dict[str, Any]:
    """The recipe as a manifest holds it: an adapter may be given away, and paths of this machine stay here."""
    values = recipe.model_dump()
    values["model"] = base.name
    values["data"]["path"] = Path(values["data"]["path"]).name
    values["data"]["template"] = Path(values["data"]["template"]).name
    return values


def identity(
    recipe: Recipe, base: store.Base, prepared: Prepared, manifest: store.Manifest, processes: int
) -> dict[str, Any]:
    """What a run is made of, wherever its files lie: the same on every process of a group, and when it goes on.

    Settings that change no byte of what is learned are left out.
    """
    harmless = {"memory_limit_gb", "on_memory", "save_every"}
    settings = recipe.model_dump(
        mode="json", exclude={"model": True, "name": True, "data": {"path"}, "train": harmless}
    )
    settings["data"]["template"] = Path(settings["data"]["template"]).name  # its text is in the fingerprint below
    return {
        "recipe": settings,
        "tokenizer": {"files": manifest.tokenizer, "chat_template": manifest.chat_template},
        "machine": {"processes": processes, "device": "gpu" if device.on_gpu() else "cpu", "mlx": version("mlx")},
        "model": base.model_dump(mode="json", exclude={"name"}),
        "data": {
            str(number): f"{file['rows']} rows, sha256 {file['sha256'][:16]}"
            for number, file in enumerate(prepared.files)
        },
    }
