"""Whatever happens to a file on its way: rows or problems, never a traceback, and nothing is read for ever."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.config import Data
from mlx_lora.data.read import read
from tests.data.conftest import ROWS
from tests.data.readers.made import CLAUDE, GPT
from tests.data.readers.test_files import ALL_CHATS, KINDS, Kind

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
    file = path if path.is_file() else min(inside for inside in path.rglob("*") if inside.is_file())
    sound, chance = file.read_bytes(), random.Random(kind.name)
    for _ in range(TIMES):
        file.write_bytes(damaged(sound, chance))
        source = read(path, Data(**kind.settings))
        assert source.examples or source.problems
        for problem in source.problems:
            str(problem).encode()


ODD = (None, 5, -1, 10**400, 1.5, True, "", "x", [], {}, [None], [5], ["x"], [[]], {"x": 1}, {"text": []})
EXPORTS: dict[str, Any] = {
    "telegram": ALL_CHATS, "chatgpt": [GPT, GPT], "claude": [CLAUDE, CLAUDE], "rows": {"data": [ROWS["messages"]] * 2},
    "sharegpt": [ROWS["sharegpt"]] * 2, "alpaca": [ROWS["alpaca"]] * 2, "lists": [ROWS["completion lists"]] * 2,
}  # fmt: skip


def changed(value: Any, chance: random.Random) -> Any:
    """A JSON value with one of its parts, or itself, replaced by something else."""
    inner = (
        list(value.keys() if isinstance(value, dict) else range(len(value))) if isinstance(value, dict | list) else []
    )
    if not inner or chance.random() < 0.1:
        return chance.choice(ODD)
    key = chance.choice(inner)
    made = dict(value) if isinstance(value, dict) else list(value)
    made[key] = changed(value[key], chance)
    return made


@pytest.mark.parametrize("name", EXPORTS)
def test_parts_of_other_types_give_rows_or_problems(name: str, tmp_path: Path) -> None:
    file, chance = tmp_path / "result.json", random.Random(name)
    for _ in range(TIMES * 8):
        value = EXPORTS[name]
        for _ in range(chance.choice([1, 1, 2, 4])):
            value = changed(value, chance)
        file.write_text(json.dumps(value))
        source = read(file, Data(me="Ben"))
        for problem in source.problems:
            str(problem).encode()
