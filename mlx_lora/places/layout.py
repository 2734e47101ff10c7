"""Where programs for language models keep their models on this disk. Names directories only; reads no model.

Each function gives the directories in the order in which the program itself looks for them, whether they exist or not.
"""

from __future__ import annotations

import os
from pathlib import Path

from mlx_lora import files
from mlx_lora.errors import ModelError

HOME, HUB, LM_STUDIO, OLLAMA, LLAMA_CPP = "home", "hub cache", "LM Studio", "Ollama", "llama.cpp"


def hub_caches() -> list[tuple[str, Path]]:
    """(place, directory) of every cache in Hugging Face's layout: the hub's own, then llama.cpp's where it is another.

    llama.cpp takes the hub's cache too, unless LLAMA_CACHE names a directory.
    """
    caches = [(HUB, hub_cache())]
    if own := os.environ.get("LLAMA_CACHE"):
        caches.append((LLAMA_CPP, _expanded(own)))
    return [(place, path) for index, (place, path) in enumerate(caches) if path not in dict(caches[:index]).values()]


def hub_cache() -> Path:
    """Hugging Face's cache of models."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if value := os.environ.get(variable):
            return _expanded(value)
    if value := os.environ.get("HF_HOME"):
        return _expanded(value) / "hub"
    return _user_cache() / "huggingface" / "hub"


def llama_cpp_folders() -> list[Path]:
    """Where older builds of llama.cpp keep files as owner_repo_file.gguf, all in one directory."""
    named = os.environ.get("LLAMA_CACHE")
    usual = [_expanded("~/Library/Caches") / "llama.cpp", _user_cache() / "llama.cpp"]
    return list(dict.fromkeys([*([_expanded(named)] if named else []), *usual]))


def lm_studio_models() -> Path:
    """LM Studio's folder of models, publisher/model/.

    The folder can be chosen: then settings.json in LM Studio's own home says where it is.
    """
    home = _lm_studio_home()
    try:
        settings = files.read_json(home / "settings.json", ModelError)
    except ModelError:  # no settings, or damaged ones: LM Studio itself takes its defaults then
        settings = None
    chosen = settings.get("downloadsFolder") if isinstance(settings, dict) else None
    return _expanded(chosen) if isinstance(chosen, str) and chosen.strip() else home / "models"


def _lm_studio_home() -> Path:
    pointer = _expanded("~/.lmstudio-home-pointer")
    try:
        if named := files.read_text(pointer, ModelError, most=1 << 16).strip():
            return _expanded(named)
    except ModelError:  # there is no pointer
        pass
    older = _expanded("~/.cache/lm-studio")
    return older if older.is_dir() else _expanded("~/.lmstudio")


def ollama_models() -> list[Path]:
    """Ollama's directories of manifests and blobs: the one that is named, or the user's and the Linux service's."""
    if named := os.environ.get("OLLAMA_MODELS"):
        return [_expanded(named)]
    return [_expanded("~/.ollama/models"), Path("/usr/share/ollama/.ollama/models")]


def _user_cache() -> Path:
    return _expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")


def _expanded(path: str) -> Path:
    return Path(os.path.expanduser(os.path.expandvars(path)))
