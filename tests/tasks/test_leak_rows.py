"""The audit's rows: what training set aside is held out, what was planted is apart, and no text leaves but by --out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.config import Data
from mlx_lora.data.canaries import read_record
from mlx_lora.data.encode import Encoder
from mlx_lora.data.prepare import prepare, silent
from mlx_lora.models.open import load_tokenizer
from mlx_lora.store import registry
from mlx_lora.store.adapter import read
from mlx_lora.tasks.leak_rows import Gathered, gather
from tests.cli.conftest import Ran
from tests.conftest import questions


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    from mlx_lora.cli import main

    def call(*words: object) -> Ran:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        printed = capsys.readouterr()
        return Ran(int(ended.value.code or 0), printed.out, printed.err)

    return call


def different(count: int, *, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"the code of room {number}?", "completion": f"{number:03}"} for number in range(start, count)]


def train(run: Callable[..., Ran], base: Path, data: Path, *more: str) -> None:
    words = ("train", "--model", base, "--data", data, "--name", "mine", "train.iters=2", "train.batch_size=4")
    assert run(*words, *more).code == 0


def gathered(base: Path, data: Path, held_out: Path | None = None, most: int = 100) -> Gathered:
    stored = read(registry.find("mine"))
    encoder = Encoder(load_tokenizer(base), Data())
    other = str(held_out) if held_out else None
    return gather(str(data), other, encoder, stored.manifest, most=most, progress=silent)


def test_rows_that_training_set_aside_are_held_out(
    run: Callable[..., Ran], tiny_path: Path, write_rows: Callable[..., Path]
) -> None:
    file = write_rows(different(30), name="rows.jsonl")
    train(run, tiny_path, file, "seed=3")
    found = gathered(tiny_path, file)
    learned = prepare(file, Data(), load_tokenizer(tiny_path), seed=3)
    assert len(found.others.rows) == 3 and not found.notes
    for part, rows in ((found.members, learned.train), (found.others, learned.valid)):
        assert [row.tokens.tolist() for row in part.rows] == [row.tokens.tolist() for row in rows]
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        tokenizer = load_tokenizer(tiny_path)
        for row, number in zip(part.rows, part.numbers, strict=True):
            assert lines[int(number)]["prompt"] in tokenizer.decode(row.tokens.tolist())


def test_held_out_rows_that_were_learned_are_left_out(
    run: Callable[..., Ran], tiny_path: Path, write_rows: Callable[..., Path]
) -> None:
    write_rows(different(20), name="train.jsonl")
    data = write_rows(different(25, start=15), name="test.jsonl").parent
    train(run, tiny_path, data, "data.valid_fraction=0")
    found = gathered(tiny_path, data)
    assert found.others.numbers.tolist() == [5, 6, 7, 8, 9] and "5 held-out rows" in found.notes[0]
    assert gathered(tiny_path, data, most=4).members.numbers.tolist() == [0, 6, 13, 19]
    write_rows(different(21), name="train.jsonl")
    assert "changed since" in gathered(tiny_path, data).notes[0]


def test_planted_rows_are_no_members(
    run: Callable[..., Ran], tiny_path: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "planted"
    assert run("data", "canaries", write_rows(different(20)), "--out", out, "--repeat", "2", "--each", 3).code == 0
    train(run, tiny_path, out)
    found = gathered(tiny_path, out)
    planting = read_record(out / "train.jsonl")
    assert planting is not None and found.planting == planting
    assert sorted([*found.members.numbers, *planting.planted()]) == list(range(18 + 6))
    assert len(found.others.rows) == 2


def test_more_secrets_than_can_be_ranked_are_refused(run: Callable[..., Ran]) -> None:
    ran = run("study", "leaks", "mine", "--data", "rows.jsonl", "--candidates", 10**6)
    assert ran.code == 2 and "--candidates" in ran.err


def test_training_rows_are_never_written_over(
    run: Callable[..., Ran], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    file = write_rows(different(3))
    before = file.read_bytes()
    ran = run("study", "leaks", "mine", "--data", file.parent, "--out", file, "--force")
    assert ran.code == 1 and "is the file that is read" in ran.err and file.read_bytes() == before


@pytest.mark.real
def test_the_command_prints_no_text_of_a_row_and_writes_it_where_it_is_told(
    run: Callable[..., Ran], tiny_path: Path, write_rows: Callable[..., Path], tmp_path: Path, home: Path
) -> None:
    write_rows(questions(12))  # seven different rows: learned soon
    data = write_rows(different(6), name="test.jsonl").parent
    planted, out = tmp_path / "planted", tmp_path / "back.jsonl"
    assert run("data", "canaries", data, "--out", planted, "--repeat", "1", "--each", 1).code == 0
    train(run, tiny_path, planted, "train.learning_rate=0.02", "train.iters=12")
    words = ("study", "leaks", "mine", "--data", planted, "--candidates", 15, "--given", 4, "--out", out)
    ran = run(*words)
    assert ran.code == 0, ran.err
    assert "never planted" in ran.out and "planted once" in ran.out and "mine" in ran.out.splitlines()[-1]
    lines = [json.loads(line) for line in (planted / "train.jsonl").read_text().splitlines()]
    for row in map(json.loads, out.read_text().splitlines()):
        whole = "".join(lines[row["row"]].values())
        assert row["came_back"] and row["came_back"] in whole
    assert "twice" not in ran.out + ran.err and "code of" not in ran.out + ran.err
    refused = run(*words)
    assert refused.code == 1 and "exists" in refused.err
    assert not [path for path in home.rglob("*") if path.is_file() and b"code of" in path.read_bytes()]
