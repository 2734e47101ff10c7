"""The models on this disk, wherever a program keeps them: read only, nothing is fetched or executed.

A broken entry is a note and never an error, because it is another program's. Configurations and the first fields of
GGUF files are read; weights are not.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_lora import files, paths
from mlx_lora.errors import ModelError
from mlx_lora.places import layout
from mlx_lora.places.found import GGUF, Found, Listing, of_gguf

# An owner and a name, as on a hub; `./models/x` and `~/x` are paths.
REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_LAYER = "application/vnd.ollama.image."
# Where Ollama's own library is, which its short names leave out.
_LIBRARY, _LATEST = ("registry.ollama.ai", "library"), ":latest"


def find_all() -> Listing:
    """Every model on this disk, in the order in which a name is looked up: the home's, then the other places'."""
    listing = Listing()
    models = paths.home() / "models"
    for name in model_names():
        listing.add_directory(name, layout.HOME, models / name)
    for place, cache in layout.hub_caches():
        _add_hub(listing, place, cache)
    _add_lm_studio(listing, layout.lm_studio_models())
    for models in layout.ollama_models():
        _add_ollama(listing, models)
    for folder in layout.llama_cpp_folders():
        listing.add_ggufs("", layout.LLAMA_CPP, [file for file in _entries(folder) if file.suffix == ".gguf"])
    return listing


def by_name(word: str) -> Found | None:
    """The model of a listed name; also an Ollama model without `:latest`, and the only GGUF file of a repository."""
    listed = find_all().models
    for name in (word, word + _LATEST):
        if found := next((each for each in listed if each.name == name), None):
            return found
    inside = [each for each in listed if each.kind == GGUF and each.name.rpartition("/")[0] == word]
    return inside[0] if len(inside) == 1 else None


def directory(word: str) -> Path | None:
    """The model directory of a listed name, None where there is none.

    Raises ModelError for a GGUF file, which has to be imported first.
    """
    if cached := in_hub_cache(word):
        return cached
    found = by_name(word)
    if found is None:
        return None
    if found.kind == GGUF:
        raise ModelError(f"{word} is a GGUF file, a model is a directory", hint=f"import-gguf {word} --name NAME")
    return found.path


def close_to(word: str) -> list[str]:
    """The listed name that is closest to a word, if one is close; owner, tag and ending may be left out."""
    spelled: dict[str, str] = {}
    for found in find_all().models:
        last = found.name.rpartition("/")[2]
        for spelling in (found.name, last, last.partition(":")[0], last.removesuffix(".gguf")):
            spelled.setdefault(spelling, found.name)
    return [spelled[spelling] for spelling in difflib.get_close_matches(word, spelled, n=1, cutoff=0.6)]


def gguf_file(word: str) -> Path:
    """The GGUF file that a path or a listed name means. Raises ModelError where it is another kind, or nothing."""
    path = Path(os.path.expanduser(word))
    if os.path.exists(path):
        return path
    found = by_name(word)
    if found is None:
        close = close_to(word)
        similar = f"; did you mean {close[0]!r}?" if close else ""
        raise ModelError(f"there is no file {word}, and no model of that name{similar}", hint="import-gguf --list")
    if found.kind != GGUF:
        raise ModelError(f"{word} is no GGUF file but a directory that needs no import", hint=f"--model {word}")
    return found.path


def model_names() -> list[str]:
    """Names of the models in the home. Directories with other names are unfinished work, links may lead elsewhere."""
    models = paths.home() / "models"
    entries = [entry for entry in models.iterdir() if entry.is_dir()] if models.is_dir() else []
    return sorted(entry.name for entry in entries if paths.is_name(entry.name) and files.inside(entry, models))


def in_hub_cache(repo: str) -> Path | None:
    """The snapshot of a repository with a config.json, from whichever hub cache on this disk has it whole."""
    if not REPO.fullmatch(repo):
        return None
    for _, cache in layout.hub_caches():
        with suppress(OSError):
            for snapshot in _snapshots(cache / f"models--{repo.replace('/', '--')}"):
                if (snapshot / "config.json").exists() and not _unfinished(snapshot):
                    return snapshot
    return None


def _add_hub(listing: Listing, place: str, cache: Path) -> None:
    for entry in _entries(cache):
        name = entry.name.removeprefix("models--").replace("--", "/")
        with listing.noting(place, name):
            if entry.name.startswith("models--") and entry.is_dir():
                _add_repository(listing, place, name, entry)


def _add_repository(listing: Listing, place: str, name: str, repository: Path) -> None:
    whole = next((snapshot for snapshot in _snapshots(repository) if not _unfinished(snapshot)), None)
    if whole is None:
        raise ValueError("not complete")
    ggufs = [file for pattern in ("*.gguf", "*/*.gguf") for file in whole.glob(pattern)]
    listing.add_ggufs(f"{name}/", place, ggufs)
    if not listing.add_directory(name, place, whole) and not ggufs:
        raise ValueError("it holds no model")


def _snapshots(repository: Path) -> list[Path]:
    """The snapshots of a cached repository: that of `main` first, then from the newest on."""
    snapshots = [path for path in _entries(repository / "snapshots") if path.is_dir()]
    snapshots.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    try:
        main = (repository / "refs" / "main").read_text(encoding="ascii")[:64].strip()
    except (OSError, ValueError):
        return snapshots
    return sorted(snapshots, key=lambda path: path.name != main) if _COMMIT.fullmatch(main) else snapshots


def _unfinished(snapshot: Path) -> bool:
    """Whether a download stopped before its end: a link leads nowhere, or a file is still called incomplete."""
    if any(not path.exists() for path in snapshot.rglob("*")):
        return True
    blobs = snapshot.parents[1] / "blobs"
    waiting = [path for path in _entries(blobs) if path.name.endswith(".incomplete")]
    return any(not (blobs / path.name.partition(".")[0]).exists() for path in waiting)


def _add_lm_studio(listing: Listing, models: Path) -> None:
    for publisher in _entries(models):
        for model in _entries(publisher):
            name = f"{publisher.name}/{model.name}"
            with listing.noting(layout.LM_STUDIO, name):
                listing.add_ggufs(f"{name}/", layout.LM_STUDIO, [*model.glob("*.gguf")])
                listing.add_directory(name, layout.LM_STUDIO, model)


def _add_ollama(listing: Listing, models: Path) -> None:
    with listing.noting(layout.OLLAMA, str(models)):
        for manifest in sorted((models / "manifests").glob("*/*/*/*")):
            host, owner, model, tag = manifest.parts[-4:]
            inside = (owner,) if host == _LIBRARY[0] else (host, owner)
            name = "/".join([*(() if (host, owner) == _LIBRARY else inside), model]) + f":{tag}"
            with listing.noting(layout.OLLAMA, name):
                if not manifest.name.startswith(".") and manifest.is_file():
                    _add_ollama_model(listing, name, models, files.read_json(manifest, ModelError))


def _add_ollama_model(listing: Listing, name: str, models: Path, manifest: Any) -> None:
    """Add the model of a manifest. Raises ValueError and OSError where its weights aren't there or aren't GGUF."""
    kinds: dict[str, list[str]] = {}
    layers = manifest.get("layers") if isinstance(manifest, dict) else None
    for layer in layers if isinstance(layers, list) else []:
        if isinstance(layer, dict):
            kind = str(layer.get("mediaType", "")).removeprefix(_LAYER)
            kinds.setdefault(kind, []).append(str(layer.get("digest", "")))
    if "model" not in kinds:
        stored = "safetensors in layers of Ollama's own" if "tensor" in kinds else "no weights on this disk"
        raise ValueError(f"{stored}, which import-gguf doesn't read")
    digest = _DIGEST.fullmatch(kinds["model"][0])
    if digest is None:
        raise ValueError(f"{json.dumps(kinds['model'][0][:80])} is no digest")
    beside = [word for kind, word in (("adapter", "adapter"), ("projector", "vision")) if kind in kinds]
    why = f"without its {' and '.join(beside)}" if beside else ""
    if found := of_gguf(name, layout.OLLAMA, models / "blobs" / f"sha256-{digest[1]}", why):
        if all(other.path != found.path for other in listing.models):
            listing.add(found)
        else:
            listing.models.append(found)  # several names of one file: each of them works


def _entries(folder: Path) -> Iterator[Path]:
    """What lies in a folder, by name, without hidden entries; nothing where it can't be read."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    yield from (Path(entry.path) for entry in entries if not entry.name.startswith("."))
