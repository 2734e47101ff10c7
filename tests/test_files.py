"""Files from elsewhere: what is refused by kind, size, name or content, and safetensors headers that lie."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from mlx_lora import files
from mlx_lora.errors import MlxLoraError, ModelError


def sparse(file: Path, size: int) -> None:
    with open(file, "wb") as stream:
        stream.truncate(size)


REFUSED: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "pipe": ("a.json", os.mkfifo, "is a pipe, not a file"),
    "directory": ("a.json", Path.mkdir, "is a directory, not a file"),
    "device": ("a.json", lambda file: file.symlink_to("/dev/zero"), "is a device, not a file"),
    "nothing": ("a.json", lambda file: None, "can't be read (No such file or directory)"),
    "loop": ("a.json", lambda file: file.symlink_to(file), "can't be read"),
    "large": ("a.json", lambda file: sparse(file, 200 << 20), "has 210 MB, more than any such file needs (34 MB)"),
    "pickle by content": ("a.json", lambda file: file.write_bytes(pickle.dumps([1])), "is a pickle"),
    "old pickle": ("a.json", lambda file: file.write_bytes(pickle.dumps([1], protocol=2)), "is a pickle"),
    "archive": ("a.json", lambda file: np.savez(file.open("wb"), a=np.zeros(1)), "is a zip archive"),
    "array": ("a.json", lambda file: np.save(file.open("wb"), np.zeros(1)), "is a numpy array file"),
    **{f"pickle by {end}": (f"a{end}", Path.touch, f"is never opened: a {end} file") for end in sorted(files.PICKLES)},
    "pickle in capitals": ("a.PKL", Path.touch, "is never opened"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_is_no_file_of_its_kind_is_refused(case: str, tmp_path: Path) -> None:
    name, make, said = REFUSED[case]
    make(tmp_path / name)
    assert said in (files.fault(tmp_path / name, most=files.SMALL) or "")
    with pytest.raises(ModelError, match="a\\.") as caught:
        files.read_json(tmp_path / name, ModelError)
    assert said in caught.value.message


def test_a_name_with_a_null_character_is_refused() -> None:
    assert "null" in (files.fault(Path("a\0.json")) or "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "Expecting value"),
        (b"{", "not readable as JSON"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'{"a": "\xff"}', "utf-8"),
        (b"[" * 200000, "nested too deeply"),
        (b"[" * files.DEEPEST + b"1" + b"]" * files.DEEPEST, "nested too deeply"),
        (b"9" * 5000, "4300 digits"),
    ],
)
def test_what_is_not_json_is_refused(text: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ModelError, match=said):
        files.read_json(tmp_path / "a.json", ModelError)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_lacks_are_refused_where_they_mean_nothing(number: str, tmp_path: Path) -> None:
    """Configurations of state-space models hold Infinity; an adapter's files have no use for it."""
    (tmp_path / "a.json").write_text(f'{{"a": [{number}]}}')
    assert len(files.read_json(tmp_path / "a.json", ModelError)["a"]) == 1
    with pytest.raises(ModelError, match="is not a number here"):
        files.read_json(tmp_path / "a.json", ModelError, finite=True)


def test_json_that_is_sound_is_read(tmp_path: Path) -> None:
    deep = json.loads("[" * (files.DEEPEST - 1) + "1" + "]" * (files.DEEPEST - 1))
    for value in ({"a": [1.5, None, "ä"]}, deep, 7, {}):
        (tmp_path / "a.json").write_text(json.dumps(value))
        assert files.read_json(tmp_path / "a.json", ModelError, finite=True) == value


def tensor(shape: list[int], *, at: int = 0, kind: str = "F32", size: int = 4) -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [at, at + size * int(np.prod(shape))]}


def safetensors(header: dict[str, Any] | str, *, data: int = 8, length: int | None = None) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


TWICE = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}'
HEADERS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "header too small"),
    "longer than the file": (safetensors({"a": tensor([2])}, length=1 << 20), "invalid header length"),
    "longer than any": (safetensors({"a": tensor([2])}, length=1 << 63), "header too large"),
    "shorter than it is": (safetensors({"a": tensor([2])}, length=5), "invalid JSON"),
    "no JSON": (safetensors("{x}"), "invalid JSON"),
    "negative size": (safetensors({"a": {**tensor([2]), "shape": [-1, -2]}}), "invalid JSON"),
    "sizes that overflow": (safetensors({"a": {**tensor([2]), "shape": [1 << 40, 1 << 40]}}), "overflow"),
    "fewer bytes than its shape": (safetensors({"a": {**tensor([2]), "shape": [3]}}), "invalid shape"),
    "overlap": (safetensors({"a": tensor([2]), "b": tensor([1], at=4)}), "invalid offset"),
    "gap": (safetensors({"a": tensor([1], at=4)}), "invalid offset"),
    "beyond the end": (safetensors({"a": tensor([3])}), "not fully covered"),
    "bytes of nobody": (safetensors({"a": tensor([1])}), "not fully covered"),
    "unknown type": (safetensors({"a": tensor([2], kind="Q4")}), "unknown variant"),
    # What the library lets through, and MLX would wrap, guess, or choose between.
    "a name twice": (safetensors(TWICE), "a name is given twice"),
    "a dimension beyond MLX": (safetensors({"a": tensor([0, 1 << 40])}, data=0), "a shape that MLX can't hold"),
    "too many dimensions": (safetensors({"a": tensor([2] + [1] * 60)}), "a shape that MLX can't hold"),
    "a type MLX lacks": (safetensors({"a": tensor([1], kind="F64", size=8)}), "type F64, which MLX doesn't have"),
    "a pickle": (pickle.dumps({"a": 1}), "it is a pickle, and reading one runs code"),
    "an archive": (b"PK\x03\x04" + bytes(100), "it is a zip archive, as PyTorch keeps pickles in"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_safetensors_headers_that_lie_are_refused(case: str, tmp_path: Path) -> None:
    content, said = HEADERS[case]
    (tmp_path / "a.safetensors").write_bytes(content)
    found = files.safetensors_fault(tmp_path / "a.safetensors")
    assert found and found.startswith("not a readable safetensors file") and said in found


@pytest.mark.parametrize("padding", range(0, 700, 64))
def test_sound_headers_pass_whatever_their_first_bytes(padding: int, tmp_path: Path) -> None:
    """A header of 640 bytes begins as a pickle does: 80 02."""
    text = json.dumps({"__metadata__": {"format": "mlx"}, "a": tensor([2]), "b": tensor([], at=8)})
    content = safetensors(text + " " * (640 - len(text) + padding - 320), data=12)
    (tmp_path / "a.safetensors").write_bytes(content)
    assert files.safetensors_fault(tmp_path / "a.safetensors") is None
    with safe_open(tmp_path / "a.safetensors", framework="numpy") as opened:
        assert set(opened.keys()) == {"a", "b"}


@pytest.mark.parametrize(("make", "said"), [(os.mkfifo, "a pipe"), (Path.mkdir, "a directory")])
def test_weights_that_are_no_file_are_not_waited_for(make: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    make(tmp_path / "a.safetensors")
    assert said in (files.safetensors_fault(tmp_path / "a.safetensors") or "")


def test_links_are_followed_to_see_what_lies_inside(tmp_path: Path) -> None:
    home, outside = tmp_path / "home", tmp_path / "outside"
    home.mkdir()
    outside.mkdir()
    (home / "out").symlink_to(outside)
    (home / "in").symlink_to(home)
    (home / "loop").symlink_to("loop")
    (tmp_path / "other").symlink_to(home)
    assert files.inside(home / "a", home) and files.inside(home / "in" / "a", home) and files.inside(home, home)
    assert files.inside(home / "a", tmp_path / "other") and files.inside(tmp_path / "other" / "a", home)
    assert not files.inside(home / "out", home) and not files.inside(home / ".." / "outside", home)
    assert not files.inside(tmp_path / "homes", home)
    assert files.inside(home / "loop", home)


def test_a_librarys_errors_and_panics_become_one_of_ours() -> None:
    class PanicException(BaseException):
        """As pyo3 raises it."""

    for problem in (ValueError("first\nsecond"), RecursionError("first"), PanicException("first")):
        with pytest.raises(ModelError, match="^can't load: first \\("), files.refusing(ModelError, "can't load"):
            raise problem
    with pytest.raises(MlxLoraError, match="^ours$"), files.refusing(ModelError, "can't load"):
        raise MlxLoraError("ours")
    with pytest.raises(KeyboardInterrupt), files.refusing(ModelError, "can't load"):
        raise KeyboardInterrupt
