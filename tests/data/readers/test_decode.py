"""Encodings, JSON out of a stream in small pieces, and libraries that aren't installed."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.config import Data
from mlx_lora.data.read import read
from mlx_lora.data.readers import decode, json_values
from mlx_lora.data.readers.base import Unreadable, cell
from mlx_lora.data.readers.json_values import Scanner
from tests.data.readers.made import excel, parquet

RUSSIAN = "Съешь же ещё этих мягких французских булок, да выпей чаю. " * 9
FRENCH = "Dès Noël, où un zéphyr haï me vêt de glaçons würmiens, je dîne exquisément. «Ça va ?» — oui… " * 9


@pytest.fixture
def decoded(tmp_path: Path) -> Callable[[bytes], tuple[str, list[str]]]:
    def make(content: bytes) -> tuple[str, list[str]]:
        notes: list[str] = []
        (tmp_path / "a.txt").write_bytes(content)
        return decode.whole(tmp_path / "a.txt", notes.append), notes

    return make


@pytest.mark.parametrize(
    ("text", "encoding", "notes"),
    [
        (FRENCH, "utf-8", []),
        (FRENCH, "utf-8-sig", []),
        (FRENCH, "cp1252", ["read as cp1252"]),
        (FRENCH, "utf-16", ["read as UTF-16"]),
        (FRENCH, "utf-16-be", ["read as UTF-16-BE"]),
        (FRENCH, "utf-32", ["read as UTF-32"]),
        (RUSSIAN, "cp1251", ["read as cp1251"]),
        ("r\xe9sum\xe9", "cp1252", ["read as cp1252"]),
        ("", "utf-8", []),
        ("\x1b[1mbold\x1b[0m", "utf-8", []),
    ],
)
def test_encodings_are_recognised_and_said(
    decoded: Callable[[bytes], tuple[str, list[str]]], text: str, encoding: str, notes: list[str]
) -> None:
    assert decoded(text.encode(encoding)) == (text, notes)


@pytest.mark.parametrize(
    ("content", "said", "line"),
    [
        (b"\xc3\xa9" * 9 + b"\n\xff" + b"\xc3\xa9" * 9, "is not UTF-8 (byte 19 of the file)", 2),
        (b"\xef\xbb\xbfa\n\xff", "is not UTF-8 (byte 5 of the file)", 2),
        (b"\xff\xfea\0\n\0a", "is not UTF-16 throughout (byte 6 of the file)", 2),
        (b"\x00\x01\x02\x03" * 99, "is not text", 0),
        (b"\xff\x01\x02\x03" * 99, "is not text", 0),
    ],
)
def test_what_is_damaged_or_no_text(
    decoded: Callable[[bytes], tuple[str, list[str]]], content: bytes, said: str, line: int
) -> None:
    with pytest.raises(Unreadable) as raised:
        decoded(content)
    assert (str(raised.value), raised.value.line) == (said, line)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 20])
def test_damage_is_found_wherever_chunks_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(decode, "CHUNK", size)
    (tmp_path / "a.txt").write_bytes("é\né\né\nàé".encode() + b"\xc3\nabc" + "éé".encode())
    fault = decode.first_fault(tmp_path / "a.txt", "utf-8")
    assert fault is not None and (fault.byte, fault.line) == (13, 4)


VALUES: list[Any] = [{"a": [1, 2.5, 'x\\"y', None]}, -12, "", [], {}, True, {"é": "\n"}, 1e9, 12345678]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1 << 16])
def test_json_is_the_same_in_pieces_of_any_size(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(json_values, "CHUNK", size)
    text = json.dumps(VALUES, indent=2)
    scanner = Scanner(io.StringIO(text))
    elements = list(scanner.elements())
    scanner.end()
    assert [value for _, value in elements] == VALUES
    lines = text.split("\n")
    for line, value in elements:
        assert lines[line - 1].strip().startswith(json.dumps(value, ensure_ascii=True)[0])


@pytest.mark.parametrize("size", [1, 4, 1 << 16])
@pytest.mark.parametrize(
    ("text", "line"),
    [("[1,\n2", 2), ("[1,\n]", 2), ("[1\n2]", 2), ("[1]\n2", 2), ("[\n{'a': 1}]", 2), ("[nul]", 1)],
)
def test_broken_json_names_its_line(monkeypatch: pytest.MonkeyPatch, text: str, line: int, size: int) -> None:
    monkeypatch.setattr(json_values, "CHUNK", size)
    scanner = Scanner(io.StringIO(text))
    with pytest.raises(Unreadable, match="not valid JSON") as raised:
        list(scanner.elements())
        scanner.end()
    assert raised.value.line == line


def test_an_error_early_in_a_long_file_is_found_without_reading_it() -> None:
    stream = io.StringIO('[{"a" 1}' + " " * (1 << 24))
    with pytest.raises(Unreadable):
        list(Scanner(stream).elements())
    assert stream.tell() < 1 << 18


@pytest.mark.parametrize(
    ("name", "write", "library"),
    [("a.xlsx", excel(), "openpyxl"), ("a.parquet", parquet({"text": ["a"]}), "pyarrow")],
)
def test_a_missing_library_is_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, write: Callable[[Path], None], library: str
) -> None:
    file = tmp_path / name
    write(file)
    for module in [module for module in sys.modules if module.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    (problem,) = read(file, Data()).problems
    assert problem.problem == f"needs the library {library}: pip install 'mlx-lora[data]'"


def test_without_a_detector_old_encodings_are_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "charset_normalizer", None)
    (tmp_path / "a.csv").write_bytes(b"text\ncaf\xe9\n")
    (problem,) = read(tmp_path / "a.csv", Data()).problems
    assert problem.line == 2 and problem.problem.endswith("other encodings need pip install 'mlx-lora[data]'")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (1, "1"), (1.0, "1"), (0.1, "0.1"), (True, "true"), ("x", "x"), (float("nan"), "nan"),
     ([{"a": None, "b": [None]}], [{"b": [None]}])],
)  # fmt: skip
def test_cells_are_text(value: Any, text: Any) -> None:
    assert cell(value) == text
