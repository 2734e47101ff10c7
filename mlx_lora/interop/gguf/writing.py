"""A GGUF file's beginning, metadata of the right types and the list of tensors; and files written whole or not."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from mlx_lora import paths
from mlx_lora.errors import NameTaken

# Metadata lists whose elements have another type than gguf's writer would choose.
LISTS = {"tokenizer.ggml.token_type": gguf.GGUFValueType.INT32, "tokenizer.ggml.scores": gguf.GGUFValueType.FLOAT32}


def write_header(writer: gguf.GGUFWriter, fields: Mapping[str, Any]) -> None:
    """Write `fields` and the tensors' infos that the writer was given; then their data can follow, in that order."""
    kinds = gguf.GGUFValueType
    for key, value in fields.items():
        if key == "general.architecture":  # the writer adds its own
            continue
        if isinstance(value, list | tuple):
            writer.add_key_value(key, list(value), kinds.ARRAY, sub_type=LISTS.get(key))
        elif isinstance(value, bool | np.bool_):
            writer.add_bool(key, bool(value))
        elif isinstance(value, int):
            writer.add_uint32(key, value) if value >= 0 else writer.add_int32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, str(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def check_file(out: Path, *, force: bool) -> None:
    """Raise NameTaken unless a file may be written at `out`; worth knowing before the work is done."""
    if out.is_dir():
        raise NameTaken(f"{out} is a directory", hint="name a file, like model.gguf")
    if os.path.lexists(out) and not force:
        raise NameTaken(f"{out} exists", hint="choose another name, or --force to replace it")


@contextmanager
def written_beside(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a folder beside `out`; when the block succeeds, its files take their places there, `out` last.

    They are on the disk before that. A file inside the home is the user's alone. Raises NameTaken as `check_file`.
    """
    out = Path(os.path.abspath(out))
    check_file(out, force=force)
    private = out.is_relative_to(paths.home().absolute())
    out.parent.mkdir(mode=0o700 if private else 0o777, parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
        files = sorted(folder.iterdir(), key=lambda file: file.name == out.name)
        for file in files:
            if private:
                file.chmod(0o600)
            paths.synchronize(file)
        for file in files:
            os.replace(file, out.parent / file.name)
        paths.synchronize(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
