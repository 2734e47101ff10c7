"""`mlx-lora pull`: the only code that opens a network connection.

Downloads into a directory of its own inside the home, so that an interrupted pull continues where it stopped, and
moves it into place only when complete. The configuration comes first: a model that could not be loaded is refused
before its weights, and leaves nothing behind. Weights are safetensors or nothing; code is not downloaded.
"""

from __future__ import annotations

import logging
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mlx_lora import paths
from mlx_lora.errors import MlxLoraError, ModelError, NameTaken
from mlx_lora.models.multimodal import PROCESSOR_FILES
from mlx_lora.models.open import check_architecture, check_files, read_config
from mlx_lora.models.save import TOKENIZER_FILES

WEIGHTS = "model*.safetensors"
SETTINGS = ["config.json", "tokenizer_config.json"]
WANTED = [WEIGHTS, "model.safetensors.index.json", "config.json", *TOKENIZER_FILES, PROCESSOR_FILES]
# Free space to leave on the disk.
SPARE = 1 << 30

log = logging.getLogger(__name__)


def pull(repo: str, *, name: str | None = None) -> Path:
    """Download a model repository into the home's models as `name` (the repository's own by default).

    Raises NameTaken when the name is in use, ModelError when the hub refuses, the disk is too small, or what came is
    not a usable model. What was interrupted is kept and continued by the next call; what is refused is not.
    """
    target = paths.room("models", name or repo.rpartition("/")[2])
    if target.exists():
        raise NameTaken(f"a model {target.name!r} exists", hint="--name another one")
    partial = target.parent / f".{target.name}.partial"
    try:
        _download(repo, partial)
    except MlxLoraError:
        raise
    except Exception as error:  # the hub's own errors, the disk's, and those of whichever HTTP library it uses
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        kept = f"; what came is in {partial}" if _kept(partial) else ""
        raise ModelError(f"can't pull {repo}: {first}{kept}", hint="run it again to continue") from error
    except BaseException:  # Ctrl-C
        if _kept(partial):
            log.info("what came is in %s, running it again continues", partial)
        raise
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    partial.rename(target)
    return target


def _download(repo: str, partial: Path) -> None:
    """Bring the settings, look at them, and bring the rest. Whatever is refused takes what came with it."""
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(repo, files_metadata=True)
    if not any(fnmatch(file.rfilename, WEIGHTS) for file in info.siblings or []):
        raise ModelError(f"{repo} has no {WEIGHTS}", hint="choose a repository with weights in safetensors")
    needed = _bytes(info)
    partial.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(partial.parent).free
    if needed - paths.directory_bytes(partial) + SPARE > free:
        raise ModelError(f"{repo} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in {partial.parent}")
    try:
        snapshot_download(repo, revision=info.sha, local_dir=partial, allow_patterns=SETTINGS)
        check_architecture(read_config(partial))
        snapshot_download(repo, revision=info.sha, local_dir=partial, allow_patterns=WANTED)
        check_files(partial)
    except MlxLoraError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _kept(partial: Path) -> bool:
    """Whether anything came; a directory without a byte goes."""
    if partial.is_dir() and not paths.directory_bytes(partial):
        shutil.rmtree(partial, ignore_errors=True)
    return partial.is_dir()


def _bytes(info: Any) -> int:
    return sum(
        file.size or 0 for file in info.siblings or [] if any(fnmatch(file.rfilename, pattern) for pattern in WANTED)
    )
