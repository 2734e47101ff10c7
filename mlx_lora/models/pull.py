"""`mlx-lora pull`: the only code that opens a network connection.

Downloads into a directory of its own inside the home, so that an interrupted pull continues where it stopped, and
moves it into place only when complete. Weights are safetensors or nothing; code in a repository is not downloaded.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mlx_lora import paths
from mlx_lora.errors import MlxLoraError, ModelError, NameTaken
from mlx_lora.models.load import TOKENIZER_FILES, check_files, read_config

WANTED = ["model*.safetensors", "model.safetensors.index.json", "config.json", *TOKENIZER_FILES]
# Free space to leave on the disk.
SPARE = 1 << 30


def pull(repo: str, *, name: str | None = None) -> Path:
    """Download a model repository into the home's models as `name` (the repository's own by default).

    Raises NameTaken when the name is in use, ModelError when the hub refuses, the disk is too small, or what came is
    not a usable model.
    """
    from huggingface_hub import HfApi, snapshot_download

    target = paths.room("models", name or repo.rpartition("/")[2])
    if target.exists():
        raise NameTaken(f"a model {target.name!r} exists", hint="--name another one")
    try:
        needed = _bytes(HfApi().model_info(repo, files_metadata=True))
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        partial = target.parent / f".{target.name}.partial"
        if needed - paths.directory_bytes(partial) + SPARE > free:
            raise ModelError(f"{repo} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in {target.parent}")
        snapshot_download(repo, local_dir=partial, allow_patterns=WANTED)
    except MlxLoraError:
        raise
    except Exception as error:  # the hub's own errors, the disk's, and those of whichever HTTP library it uses
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"can't pull {repo}: {first}", hint="run it again to continue") from error
    read_config(partial)
    check_files(partial)
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    partial.rename(target)
    return target


def _bytes(info: Any) -> int:
    from fnmatch import fnmatch

    return sum(
        file.size or 0 for file in info.siblings or [] if any(fnmatch(file.rfilename, pattern) for pattern in WANTED)
    )
