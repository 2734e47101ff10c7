"""Which files of a path are train, valid and test."""

from __future__ import annotations

from pathlib import Path

from mlx_lora import files, paths
from mlx_lora.data import readers
from mlx_lora.errors import DataError, Problem

SPLITS = ("train", "valid", "test")

# Which file of a folder is read, in order of preference. Adapters are evaluated on test rows, since validation rows may
# have chosen between them. Quantizing and fusing measure a model on validation rows, so that test rows stay unused.
TEST_FIRST = ("test", "valid", "train")
VALID_FIRST = ("valid", "test", "train")


def find_splits(path: str | Path) -> dict[str, Path]:
    """The files of a data path by split name; a folder of documents stands for one file.

    Raises DataError when there are none.
    """
    root = paths.existing(path)
    if root is None:
        raise DataError([Problem(str(path), 0, "no such file or folder")])
    if not root.is_dir():
        return {"train": _one_file(root)}
    splits = {}
    for split in SPLITS:
        named = [root / f"{split}{ending}" for ending in readers.ENDINGS if (root / f"{split}{ending}").exists()]
        named += [folder for folder in [root / split] if folder.is_dir() and readers.documents(folder)]
        if len(named) > 1:
            raise DataError([Problem(str(root), 0, f"has both {named[0].name} and {named[1].name}")], hint="keep one")
        if named:
            splits[split] = named[0]
    return splits or {"train": _documents(root)}


def chosen_file(path: str, prefer: tuple[str, ...] = TEST_FIRST) -> Path:
    """The file of a data path to evaluate on, the first split of `prefer` that is there. Raises DataError for none."""
    splits = find_splits(path)
    return next(splits[split] for split in prefer if split in splits)


def _one_file(file: Path) -> Path:
    ending = readers.ending(file)
    if ending not in readers.ENDINGS and ending not in files.PICKLES:
        raise DataError(
            [Problem(str(file), 0, "is not a kind of file that is read here")],
            hint=f"known: {' '.join(readers.ENDINGS)}",
        )
    if found := files.fault(file, archive=ending in readers.ARCHIVES):
        raise DataError([Problem(str(file), 0, found)])
    return file


def _documents(folder: Path) -> Path:
    """A folder that holds documents and no rows."""
    tables = sorted(file for file in folder.iterdir() if readers.ending(file) in (*readers.ROWS, *readers.COMPRESSED))
    if not tables and readers.documents(folder):
        return folder
    others = f", but {tables[0].name}" if tables else ""
    raise DataError(
        [Problem(str(folder), 0, f"has no train.jsonl, valid.jsonl or test.jsonl{others}")],
        hint="name one file instead",
    )
