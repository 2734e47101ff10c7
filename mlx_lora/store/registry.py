"""The adapters of the home directory: the directory listing is the registry, so nothing can drift from it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_lora import files, methods, paths
from mlx_lora.config import Quantize
from mlx_lora.errors import AdapterError, NameTaken, nearest
from mlx_lora.places import layout
from mlx_lora.store.lock import locked
from mlx_lora.store.manifest import MANIFEST, Base, read_manifest
from mlx_lora.store.run import CAN_GO_ON

# What opens a base is imported where it is needed: MLX takes seconds, and a list of names doesn't need it.
if TYPE_CHECKING:
    from mlx_lora.models.load import LoadedModel
    from mlx_lora.models.open import Model
    from mlx_lora.store.adapter import StoredAdapter


@dataclass(frozen=True)
class Entry:
    """One line of `adapters list`; a method without a rank has 0. `state` is finished, unfinished or damaged."""

    name: str
    method: str
    rank: int
    base: str | None
    bytes: int
    valid_loss: float | None
    created: str
    state: str


def names() -> list[str]:
    """Names of the adapters in the home. A directory without a manifest is unfinished and not listed.

    Nor is a link that leads out of the home: a name never does.
    """
    root = paths.home() / "adapters"
    complete = [manifest.parent for manifest in root.glob(f"*/{MANIFEST}")]
    return sorted(path.name for path in complete if paths.is_name(path.name) and files.inside(path, root))


def find(adapter: str) -> Path:
    """The directory that an adapter's name or path means, by the rule of `paths.find`.

    Raises AdapterError naming the closest one there is.
    """
    if (path := paths.find("adapters", adapter)) and path.is_dir():
        return path if path == paths.home() / "adapters" / path.name else path.resolve()
    known = names()
    closest = nearest(adapter, known) if known else "; there are none yet"
    raise AdapterError(f"no adapter {adapter!r}{closest}", hint="mlx-lora adapters list")


def label(path: Path) -> str:
    """What to call the adapter at `path`: its name where it is the home's of that name, else its path.

    Two adapters never have one label, and `find` of a label is its adapter.
    """
    named = paths.is_name(path.name) and (paths.home() / "adapters" / path.name).resolve() == path.resolve()
    return path.name if named else str(path)


def entries() -> list[Entry]:
    """All adapters of the home, by name; one whose manifest can't be read has the method `damaged`."""
    return [_entry(name, paths.room("adapters", name)) for name in names()]


def _entry(name: str, path: Path) -> Entry:
    size = paths.directory_bytes(path)
    try:
        manifest = read_manifest(path)
    except AdapterError:  # `verify` says what is wrong; the others are still listed
        return Entry(name, "damaged", 0, base=None, bytes=size, valid_loss=None, created="", state="damaged")
    return Entry(
        name=name,
        method=manifest.method,
        rank=int(manifest.adapter["rank"]) if set(methods.parts(manifest.method)).intersection(methods.LOW_RANK) else 0,
        base=manifest.base.name if manifest.base else None,
        bytes=size,
        valid_loss=manifest.metrics.get("best_valid_loss"),
        created=manifest.created,
        state="unfinished" if manifest.metrics.get("stopped_by") in CAN_GO_ON else "finished",
    )


def rename(old: str, new: str) -> Path:
    """Give an adapter, and its run, another name; its own name changes nothing.

    Raises NameTaken where the name is taken, or one of them is in training.
    """
    if old == paths.check_name(new):
        return find_by_name(old)
    with locked(old), locked(new):
        return _rename(old, new)


def _rename(old: str, new: str) -> Path:
    source, target = find_by_name(old), paths.room("adapters", new)
    if os.path.lexists(target):  # a link that leads nowhere takes the name too
        raise NameTaken(f"an adapter {new!r} exists", hint="remove it first, or choose another name")
    source.rename(target)
    run = paths.room("runs", old)
    if run.is_dir() and not paths.room("runs", new).exists():
        run.rename(paths.room("runs", new))
    return target


def remove(name: str) -> int:
    """Delete an adapter and its run; return the bytes freed. Raises NameTaken where it is in training."""
    with locked(name):
        return _remove(name)


def _remove(name: str) -> int:
    doomed = [path for path in (find_by_name(name), paths.room("runs", name)) if path.is_dir()]
    freed = sum(paths.directory_bytes(path) for path in doomed if not path.is_symlink())
    for path in doomed:
        if path.is_symlink():  # the link is what has this name; what it leads to has another
            path.unlink()
        else:
            shutil.rmtree(path)
    return freed


def find_by_name(name: str) -> Path:
    """The home's own adapter called `name`; a path is no name."""
    paths.check_name(name)
    path, root = paths.room("adapters", name), paths.home() / "adapters"
    listed = root.is_dir() and name in os.listdir(root)  # some file systems find `SQL` where there is `sql`
    if not (listed and (path / MANIFEST).exists() and files.inside(path, root)):
        raise AdapterError(f"no adapter {name!r}{nearest(name, names()) if names() else ''}")
    return path


def describe_base(loaded: LoadedModel) -> Base:
    """The base of a model just loaded, for a manifest; call it while the tensors are as stored, before any cast."""
    from mlx_lora.store import fingerprint

    source = fingerprint.of_directory(loaded.path)
    return Base(
        name=base_name(loaded.path),
        fingerprint=fingerprint.of_model(loaded.model) if loaded.quantized else source,
        quantization=loaded.config.get("quantization"),
        source=source if loaded.quantized else None,
    )


def base_name(path: Path) -> str:
    """The directory's name; owner and name where it is a snapshot in the hub's cache, or among LM Studio's models."""
    path = path.resolve()
    if path.parent.parent == layout.lm_studio_models().resolve():
        return f"{path.parent.name}/{path.name}"
    if path.parent.name == "snapshots":
        return path.parents[1].name.removeprefix("models--").replace("--", "/")
    return path.name


def open_base(model: Model, belonging: Sequence[StoredAdapter] = ()) -> LoadedModel:
    """Load the base that all of `belonging` were trained over, quantizing it on the way when they were.

    Raises one AdapterError for every adapter that belongs to another base.
    """
    from mlx_lora.models.load import ready

    return ready(open_stored(model, belonging))


def open_stored(model: Model, belonging: Sequence[StoredAdapter] = (), *, lazily: bool = False) -> LoadedModel:
    """Like `open_base`, with the tensors as stored: for saving what comes of them.

    With `lazily` a base that is quantized on the way isn't computed yet either.
    """
    from mlx_lora.models.load import load_stored
    from mlx_lora.models.open import open_model

    opened = open_model(model)
    _ = opened.config, opened.weights  # what is wrong with the directory itself is said first
    needed, faults = [], []
    for adapter in belonging:
        if adapter.manifest.base is None:  # trained elsewhere: it doesn't say, so it goes with any
            continue
        try:
            needed.append(quantization_needed(adapter, opened.path))
        except AdapterError as error:
            faults.append(error)
    if faults:
        raise AdapterError("\n  ".join(fault.message for fault in faults), hint=faults[0].hint)
    if len({repr(quantization) for quantization in needed}) > 1:
        raise AdapterError("these adapters were trained over different quantizations of the base")
    settings = needed[0] if needed else None
    chosen = Quantize(**{key: settings[key] for key in Quantize.model_fields if key in settings}) if settings else None
    return load_stored(opened, quantization=chosen, lazily=lazily)


def quantization_needed(adapter: StoredAdapter, path: Path) -> dict[str, Any] | None:
    """How the base at `path` must be quantized on loading to become the one `adapter` was trained over.

    None when it is that base already, or when the adapter doesn't say. Raises AdapterError for another base.
    """
    base = adapter.manifest.base
    if base is None:
        return None
    from mlx_lora.store import fingerprint

    here = fingerprint.of_directory(path)
    if here == base.fingerprint:
        return None
    if here == base.source:
        return base.quantization
    bits = f" at {base.quantization['bits']} bits" if base.quantization else ""
    raise AdapterError(
        f"{adapter.name} belongs to another base: it was trained over {base.name}{bits} "
        f"({base.fingerprint[:12]}), this one is {base_name(path)} ({here[:12]})",
        hint=f"use --model {base.name}",
    )


def check_belongs(adapter: StoredAdapter, loaded: LoadedModel) -> None:
    """Raise AdapterError unless `adapter` belongs to the base just as it is loaded, quantization included."""
    if adapter.manifest.base is None:
        return
    needed = quantization_needed(adapter, loaded.path)
    done = loaded.config.get("quantization") if loaded.quantized else None
    if needed != done:
        bits = f"at {needed['bits']} bits" if needed else "as it is on disk"
        raise AdapterError(
            f"{adapter.name} belongs to {base_name(loaded.path)} {bits}, which is not how it is loaded",
            hint=f"start again with --adapter {adapter.name}",
        )
