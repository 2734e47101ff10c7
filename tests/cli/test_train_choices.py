"""Choices about how rows are laid out and what is kept, from the command line: packing and cache_prefix."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ran
from tests.cli.test_commands import TRAIN_KEYS

Run = Callable[..., Ran]


@pytest.fixture
def train(run: Run, data: Path, tiny_path: Path) -> Run:
    """`train("mine", "train.epochs=2")` trains an adapter called `mine`."""

    def call(name: str, *words: str) -> Ran:
        return run("train", "--model", tiny_path, "--data", data, "--name", name, "--json", "train.batch_size=6",
                   "train.learning_rate=0.01", "train.epochs=1", "train.eval_every=null", "adapter.rank=4",
                   *words)  # fmt: skip

    return call


def test_packed_training_has_the_usual_keys_and_counts(train: Run, home: Path) -> None:
    packed, plain = train("packed", "data.packing=true"), train("plain")
    assert packed.code == plain.code == 0, packed.err
    assert packed.json.keys() == plain.json.keys() >= TRAIN_KEYS
    for key in ("iters", "trained_tokens", "trainable_parameters", "stopped_by"):
        assert packed.json[key] == plain.json[key], key
    assert packed.json["computed_tokens"] < plain.json["computed_tokens"]
    records = [(home / "runs" / name / "metrics.jsonl").read_text().splitlines() for name in ("packed", "plain")]
    first = [next(line for line in map(json.loads, lines) if "loss" in line) for lines in records]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-5)


def test_a_prefix_that_cannot_be_kept_is_an_error_that_says_what_to_do(train: Run, home: Path) -> None:
    refused = train("mine", "train.cache_prefix=on", "train.iters=2")
    assert refused.code == 1 and not refused.out.strip()
    assert "train.cache_prefix can't be used: the first layer is adapted" in refused.err
    assert "train.cache_prefix=off" in refused.err
    assert not (home / "adapters" / "mine").exists()
    again = train("mine", "train.cache_prefix=off", "train.iters=2")
    assert again.code == 0, "a refusal must not keep its name taken"


@pytest.mark.parametrize("word", ["on", "auto"])
def test_a_kept_prefix_trains_the_same_and_leaves_no_file(train: Run, home: Path, word: str) -> None:
    words = ["adapter.layers=1", "train.epochs=2", "train.save_every=3"]
    kept, plain = train("kept", f"train.cache_prefix={word}", *words), train("plain", "train.cache_prefix=off", *words)
    assert kept.code == plain.code == 0, kept.err
    assert kept.json["valid_loss"] == pytest.approx(plain.json["valid_loss"], rel=1e-4)
    files = [sorted(file.name for file in (home / "runs" / name).rglob("*")) for name in ("kept", "plain")]
    assert files[0] == files[1]
