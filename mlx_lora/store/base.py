"""The base that adapters belong to, found on this disk: a command with an adapter needs no `--model`.

A manifest names its base and has its fingerprint, and no path: an adapter may be given away. Where a base lies is
looked up by that name, and among the places where this machine has computed that fingerprint before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlx_lora import paths
from mlx_lora.errors import AdapterError, MlxLoraError, ModelError
from mlx_lora.models.open import OpenModel, open_model
from mlx_lora.places import listing
from mlx_lora.places.listing import REPO
from mlx_lora.store import fingerprint, registry
from mlx_lora.store.adapter import Base, StoredAdapter


def base_for(model: str | None, adapters: Sequence[StoredAdapter]) -> OpenModel:
    """The model that a command works with: `model` where the user names one, else the base of its adapters.

    Raises ModelError where nothing names a model, AdapterError where the adapters' base isn't found, and where they
    have several.
    """
    if model is not None:
        return open_model(model)
    if not adapters:
        raise ModelError("no model is named", hint="--model MODEL, or --adapter ADAPTER, which knows its base")
    check_bases(adapters)
    known = [adapter for adapter in adapters if adapter.manifest.base is not None]
    if not known:
        raise AdapterError(f"{adapters[0].name} doesn't say which base it was trained over", hint="--model names it")
    base = known[0].manifest.base
    assert base is not None
    for place in _places(base):
        opened = OpenModel(place)
        if all(_belongs(adapter, opened) for adapter in known):
            return opened
    raise _not_found(known[0], base)


def check_bases(adapters: Sequence[StoredAdapter]) -> None:
    """Raise AdapterError naming the bases where there are two; an adapter that doesn't say goes with any."""
    known = [(adapter, adapter.manifest.base) for adapter in adapters if adapter.manifest.base is not None]
    if len({base.fingerprint for _, base in known}) > 1:
        shown = ", ".join(f"{adapter.name} over {_named(base)} ({base.fingerprint[:12]})" for adapter, base in known)
        raise AdapterError(f"these adapters belong to different bases: {shown}", hint="use adapters of one base")


def _places(base: Base) -> list[Path]:
    """Directories that may hold the base: that of its name, then those where its fingerprint was computed."""
    named = _named_place(base.name)
    seen = [place for wanted in (base.fingerprint, base.source) if wanted for place in fingerprint.places(wanted)]
    return list(dict.fromkeys(place.resolve() for place in [named, *seen] if place))


def _named_place(name: str) -> Path | None:
    """The directory of a listed name. It comes from a manifest, so it is never taken for a path."""
    if name in listing.model_names():
        return paths.room("models", name)
    try:
        return listing.directory(name)
    except ModelError:  # a GGUF file of that name
        return None


def _belongs(adapter: StoredAdapter, opened: OpenModel) -> bool:
    try:
        registry.quantization_needed(adapter, opened.path)
    except MlxLoraError:  # another model lies there now, or none
        return False
    return True


def _named(base: Base) -> str:
    return base.name + (f" at {base.quantization['bits']} bits" if base.quantization else "")


def _not_found(adapter: StoredAdapter, base: Base) -> AdapterError:
    places = _places(base)
    looked = [f"{place} {'holds another model' if place.is_dir() else 'is gone'}" for place in places]
    if base.name not in {place.name for place in places}:
        looked.insert(0, f"no model {base.name!r} in {paths.home() / 'models'} or the hub's cache")
    fetch = f"mlx-lora pull {base.name}, or " if REPO.fullmatch(base.name) else ""
    return AdapterError(
        f"{adapter.name} was trained over {_named(base)} ({base.fingerprint[:12]}), which was not found: "
        + "; ".join(looked),
        hint=f"{fetch}--model MODEL, where that base lies now",
    )
