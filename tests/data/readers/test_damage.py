"""Whatever happens to a file on its way: rows or problems, never a traceback, and nothing is read for ever."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mlx_lora.config import Data
from mlx_lora.data.read import read
from tests.data.readers.test_files import KINDS, Kind

TIMES = 25
PIECES = (b"\0", b"\xff", b'"', b"{", b"[", b"\n", b"9" * 20, b"\\ud800", b": ", b"From ")


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, left out or put in, or the end cut off."""
    for _ in range(chance.choice([1, 1, 2, 5, 20])):
        at = chance.randrange(len(data) + 1)
        data = chance.choice(
            [
                data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :],
                data[:at] + data[at + chance.choice([1, 4, 50]) :],
                data[:at] + chance.choice(PIECES) + data[at:],
                data[: max(at, 1)],
            ]
        )
    return data


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_damage_gives_rows_or_problems(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / kind.name
    kind.write(path)
    if path.is_dir():
        pytest.skip("its files are kinds of their own")
    sound, chance = path.read_bytes(), random.Random(kind.name)
    for _ in range(TIMES):
        path.write_bytes(damaged(sound, chance))
        source = read(path, Data(**kind.settings))
        assert source.examples or source.problems
        for problem in source.problems:
            str(problem).encode()
