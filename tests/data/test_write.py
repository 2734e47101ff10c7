"""Examples as rows of a file: what is read back is what was written, and files appear whole or not at all."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.config import Data
from mlx_lora.data import write
from mlx_lora.data.example import Example
from mlx_lora.data.read import read
from mlx_lora.errors import MlxLoraError, NameTaken
from tests.data.conftest import ROWS, example


@pytest.mark.parametrize("format", ROWS)
def test_rows_of_every_format_are_read_back_as_written(format: str, tmp_path: Path) -> None:
    before = example(ROWS[format])
    file = tmp_path / "rows.jsonl"
    with write.files_written([file]) as files:
        files[file].write(write.line(before))
    (after,) = read(file, Data()).examples
    assert (after.text, after.messages, after.tools) == (before.text, before.messages, before.tools)


def test_letters_stay_letters() -> None:
    assert write.line(Example(text="é \u2028 日\n")) == '{"text": "é \u2028 日\\n"}\n'.encode()


@pytest.mark.parametrize(
    ("row", "more"),
    [
        ({"prompt": "a", "completion": "b"}, False),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, True),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2}, False),
        ({"text": "a"}, False),
    ],
)
def test_rows_that_learn_more_as_messages(row: dict[str, Any], more: bool) -> None:
    assert write.learns_more(example(row)) == more


def test_a_file_is_private_and_appears_only_when_complete(tmp_path: Path) -> None:
    one, two = tmp_path / "new" / "one.jsonl", tmp_path / "new" / "two.jsonl"
    with pytest.raises(RuntimeError), write.files_written([one, two]) as files:
        files[one].write(b"{}\n")
        raise RuntimeError
    assert list(one.parent.iterdir()) == []
    with write.files_written([one, two]) as files:
        files[one].write(b"{}\n")
        assert not one.exists()
    assert one.read_bytes() == b"{}\n" and two.read_bytes() == b""
    assert sorted(one.parent.iterdir()) == [one, two]
    assert {stat.S_IMODE(file.stat().st_mode) for file in (one, two)} == {0o600}


def test_targets_that_are_refused(tmp_path: Path, write_rows: Callable[..., Path]) -> None:
    there = write_rows([{"text": "a"}], name="there.jsonl")
    link = tmp_path / "link.jsonl"
    link.symlink_to(there)
    with pytest.raises(NameTaken, match="exists"):
        write.check_targets([there], force=False)
    write.check_targets([there], force=True)
    for target in (there, link):
        with pytest.raises(NameTaken, match="is the file that is read"):
            write.check_targets([target], force=True, sources=[there])
    with pytest.raises(MlxLoraError, match=r"doesn't end in \.jsonl"):
        write.check_targets([tmp_path / "a.csv"], force=True)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(NameTaken, match="is a directory"):
        write.check_targets([tmp_path / "folder.jsonl"], force=True)
    assert json.loads(there.read_text()) == {"text": "a"}
