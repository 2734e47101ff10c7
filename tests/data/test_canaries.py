"""Canaries follow from a seed, their record holds none of their text, and every format takes their rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.config import Data
from mlx_lora.data import canaries
from mlx_lora.data.canaries import Planting
from mlx_lora.data.read import read
from mlx_lora.data.sources import FORMATS
from mlx_lora.errors import MlxLoraError, NameTaken
from mlx_lora.tasks.plant_canaries import plant_canaries

REPEATS = (0, 1, 4)
ROWS = {
    "text": lambda number: {"text": f"text {number}"},
    "completions": lambda number: {"prompt": f"q {number}", "completion": f"a {number}"},
    "alpaca": lambda number: {"instruction": "do", "input": f"it {number}", "output": "done"},
    "messages": lambda number: {
        "messages": [{"role": "user", "content": f"q {number}"}, {"role": "assistant", "content": "a"}]
    },
    "sharegpt": lambda number: {
        "conversations": [{"from": "human", "value": f"q {number}"}, {"from": "gpt", "value": "a"}]
    },
}


def plant(path: Path, out: Path, **more: Any) -> Any:
    return plant_canaries(str(path), out, Data(), repeats=REPEATS, each=2, **more)


def sorted_keys(row: dict[str, Any]) -> str:
    return json.dumps(row, sort_keys=True)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_every_format_are_copied_with_canaries_among_them(
    format: str, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    originals = [ROWS[format](number) for number in range(20)]
    done = plant(write_rows(originals), tmp_path / "out")
    assert done.rows == {"train": 18 + 10, "valid": 2} and done.copies == 10
    planting = canaries.read_record(tmp_path / "out" / "train.jsonl")
    assert planting is not None and planting.format == format
    rows = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    for canary in planting.canaries:
        places = [place for place, row in enumerate(rows) if row == canary.row(format)]
        assert len(places) == canary.repeats and places == planting.rows.get(canary.number, [])
    left = [row for place, row in enumerate(rows) if place not in planting.planted()]
    valid = [json.loads(line) for line in (tmp_path / "out" / "valid.jsonl").read_text().splitlines()]
    assert Counter(map(sorted_keys, left + valid)) == Counter(map(sorted_keys, originals))
    source = read(tmp_path / "out" / "train.jsonl", Data())
    assert source.format == format and not source.problems


def test_the_record_holds_no_text_of_a_canary(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    plant(write_rows([ROWS["completions"](number) for number in range(20)]), tmp_path / "out")
    record = (tmp_path / "out" / "canaries.json").read_text()
    planting = canaries.read_record(tmp_path / "out" / "train.jsonl")
    assert planting is not None and planting.count == 6
    for canary in planting.canaries:
        assert canary.secret not in record and canary.thing not in record


def test_a_seed_makes_the_same_canaries_and_another_makes_others() -> None:
    one, same, other = (Planting(seed, REPEATS, 4, "text").canaries for seed in (1, 1, 2))
    assert one == same
    assert not {canary.secret for canary in one} & {canary.secret for canary in other}
    assert len({canary.thing for canary in one}) == 12
    others = one[0].others(255, seed=1)
    assert len(set(others)) == 255 and one[0].secret not in others and all(len(text) == 6 for text in others)


def test_a_file_of_validation_rows_is_copied_as_it_is(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    rows = [ROWS["completions"](number) for number in range(10)]
    write_rows(rows[:3], name="valid.jsonl")
    done = plant(write_rows(rows[3:]).parent, tmp_path / "out")
    assert done.rows == {"train": 7 + 10, "valid": 3}


def test_nothing_is_replaced_and_nothing_is_written_where_rows_are_faulty(
    write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    good = write_rows([ROWS["text"](number) for number in range(5)])
    plant(good, tmp_path / "out")
    with pytest.raises(NameTaken, match="train.jsonl exists"):
        plant(good, tmp_path / "out")
    plant(good, tmp_path / "out", force=True)
    with pytest.raises(MlxLoraError, match="bad.jsonl:2"):
        plant(write_rows([{"prompt": "x", "completion": "y"}, {"prompt": "x"}], name="bad.jsonl"), tmp_path / "other")
    assert not (tmp_path / "other").exists() or not any((tmp_path / "other").iterdir())


def test_a_damaged_record_is_said(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    file = write_rows([ROWS["text"](0)])
    assert canaries.read_record(file) is None
    (file.parent / "canaries.json").write_text('{"seed": 1}')
    with pytest.raises(MlxLoraError, match="data canaries"):
        canaries.read_record(file)
