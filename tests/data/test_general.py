"""The general set: small, readable with every kind of settings, without repetition, and not from any task."""

from __future__ import annotations

import json

from mlx_lora import paths
from mlx_lora.config import Data
from mlx_lora.data.check import check
from mlx_lora.models.open import load_tokenizer

FILE = paths.bundled("data", "general", "general.jsonl")


def test_general_rows_are_prompts_with_answers() -> None:
    report = check(FILE, Data(), load_tokenizer(paths.bundled("data", "base")))
    assert report.format == "completions" and not report.problems and not report.duplicates
    assert 60 <= report.rows <= 100 and report.longest and report.longest <= 256


def test_general_rows_are_in_no_task() -> None:
    prompts = {json.loads(line)["prompt"] for line in FILE.read_text(encoding="utf-8").splitlines()}
    for file in paths.bundled("data", "tasks").rglob("*.jsonl"):
        assert not [prompt for prompt in prompts if json.dumps(prompt) in file.read_text(encoding="utf-8")], file
