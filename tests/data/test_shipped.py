"""The data that comes with the project: readable, without faults or leaks, and loadable by mlx_lm as it is."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import pytest

from mlx_lora import paths
from mlx_lora.config import Data
from mlx_lora.data.check import check
from mlx_lora.models.open import load_tokenizer

BASE = paths.bundled("data", "base")
TASKS = {"notes": "messages", "mail": "alpaca", "sql": "completions"}


@pytest.mark.parametrize(("task", "format"), TASKS.items())
def test_tasks_have_no_faults_and_no_leaks(task: str, format: str) -> None:
    report = check(paths.bundled("data", "tasks", task), Data(), load_tokenizer(BASE))
    assert report.format == format and not report.problems
    assert report.leaked_rows == 0 and report.rows >= 500 and report.longest and report.longest <= 256


@pytest.mark.parametrize("task", TASKS)
def test_test_rows_hold_names_that_training_rows_do_not(task: str) -> None:
    """Most capitalised words of the test file that aren't in the training file at all are names and places."""
    words = {}
    for split in ("train", "test"):
        text = paths.bundled("data", "tasks", task, f"{split}.jsonl").read_text()
        words[split] = [
            {word.strip(".,'\"\\:;?") for word in line.split() if word[:1].isupper()} for line in text.splitlines()
        ]
    known = set().union(*words["train"])
    with_new = sum(bool(row - known) for row in words["test"])
    assert with_new >= 0.8 * len(words["test"]), with_new


@pytest.mark.parametrize("file", sorted(paths.bundled("data", "examples").glob("*.jsonl")), ids=lambda file: file.stem)
def test_an_example_of_every_other_format(file: Path) -> None:
    report = check(file, Data(), load_tokenizer(BASE))
    assert not report.problems and report.rows >= 4


def test_the_base_is_small_and_mlx_lm_loads_it() -> None:
    assert (BASE / "model.safetensors").stat().st_size < 8_000_000
    model, tokenizer = mlx_lm.utils.load(str(BASE))
    assert mx.isfinite(model(mx.array([tokenizer.encode("a note")]))).all().item()
    assert json.loads((BASE / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("text", ["", " ", "two  spaces", "a\nb\n\nc", "über 10 €", "🙂", "<|user|>x", "tab\tq"])
def test_both_forms_of_the_tokenizer_agree(text: str) -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(BASE / "tokenizer.model"))
    assert list(load_tokenizer(BASE).encode(text, add_special_tokens=False)) == processor.encode(text)
