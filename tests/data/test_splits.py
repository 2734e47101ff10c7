"""Folders: splits by name, folders of documents, and their digest."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_lora.config import Data
from mlx_lora.data.prepare import prepare
from mlx_lora.data.read import find_splits, read, sha256, stream
from mlx_lora.errors import DataError
from tests.data.readers.made import folder


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["train.csv", "valid.parquet", "test.jsonl.gz"], ["train.csv", "valid.parquet", "test.jsonl.gz"]),
        (["train/a.md", "train/deep/b.txt", "valid/c.pdf", "other/d.txt"], ["train", "valid"]),
        (["train.txt", "notes/a.md"], ["train.txt"]),
        (["a.md", "deep/er/b.html"], ["."]),
        (["TRAIN/a.md"], ["."]),
    ],
)
def test_splits_of_a_folder(tmp_path: Path, names: list[str], found: list[str]) -> None:
    folder({name: b"x" for name in names})(tmp_path)
    assert list(find_splits(tmp_path).values()) == [tmp_path / name for name in found]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["train.csv", "train/a.md"], "has both train.csv and train"),
        (["a.md", "rows.csv"], "test.jsonl, but rows.csv"),
        (["picture.png", ".a.md"], "has no train.jsonl"),
    ],
)
def test_folders_that_mean_nothing(tmp_path: Path, names: list[str], said: str) -> None:
    folder({name: b"x" for name in names})(tmp_path)
    with pytest.raises(DataError, match=said):
        find_splits(tmp_path)


def test_a_folder_has_one_digest_that_follows_names_and_bytes(tmp_path: Path) -> None:
    folder({"a.md": b"one", "b/c.txt": b"two", "picture.png": b"x"})(tmp_path)
    first = sha256(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"y")
    assert sha256(tmp_path) == first
    (tmp_path / "b/c.txt").rename(tmp_path / "b/d.txt")
    renamed = sha256(tmp_path)
    (tmp_path / "a.md").write_bytes(b"One")
    assert len({first, renamed, sha256(tmp_path)}) == 3


def test_a_problem_in_a_folder_names_the_file(tmp_path: Path) -> None:
    folder({"a.md": b"one", "b.pdf": b"no", "c.txt": b""})(tmp_path)
    rows = stream(tmp_path, Data())
    items = list(rows)
    assert [item.file and item.file.name for item in items] == ["a.md", "b.pdf", "c.txt"]
    problems = [item.problem for item in items if item.problem]
    assert [(Path(problem.file).name, problem.line) for problem in problems] == [("b.pdf", 0), ("c.txt", 0)]


def test_a_stream_is_read_anew_each_time(tmp_path: Path) -> None:
    folder({"rows.csv": "question;answer\nq;à\n".encode("cp1252")})(tmp_path)
    rows = stream(tmp_path / "rows.csv", Data())
    assert (rows.format, rows.columns, rows.notes) == (None, {}, [])
    assert list(rows) == list(rows)
    assert rows.format == "completions" and rows.columns == {"prompt": "question", "completion": "answer"}
    assert rows.notes == ["columns are parted by a semicolon", "read as cp1252"]
    source = read(tmp_path / "rows.csv", Data())
    assert (source.format, source.columns, source.notes) == (rows.format, rows.columns, rows.notes)


def test_a_folder_of_documents_becomes_rows_to_train_on(tmp_path: Path, tokenizer: object) -> None:
    folder({"a.md": b"one", "b.txt": b"x" * 100})(tmp_path)
    prepared = prepare(tmp_path, Data(max_seq_length=40, too_long="split", valid_fraction=0), tokenizer)
    assert prepared.format == "text" and len(prepared.train) > 2
    assert prepared.files[0]["sha256"] == sha256(tmp_path)
