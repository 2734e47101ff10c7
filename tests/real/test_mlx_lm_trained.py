"""An adapter that mlx-lm trained, read by us: the same text as mlx-lm's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_lora.adapters.attach import put
from mlx_lora.models.load import load
from mlx_lora.store import adapter as store
from tests.real.conftest import Shell, run_mlx_lm
from tests.real.test_wikisql import PROMPTS, assert_same_text, mlx_lm_says

pytestmark = pytest.mark.real


def test_we_read_an_adapter_that_mlx_lm_trained(shell: Shell, smollm2: Path, wikisql: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (wikisql / "train.jsonl").read_text().splitlines()[:8]]
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapter = tmp_path / "theirs"
    run_mlx_lm("lora", "--model", smollm2, "--train", "--data", tmp_path, "--iters", 6, "--batch-size", 2,
               "--num-layers", 4, "--learning-rate", "1e-3", "--val-batches", 1, "--adapter-path", adapter)  # fmt: skip
    loaded = load(smollm2)
    put(loaded.model, store.wrappers_for(loaded.model, store.read(adapter)))
    for prompt in PROMPTS:
        done = shell("generate", "--model", smollm2, "--adapter", adapter, "--prompt", prompt, "--max-tokens", 24)
        assert_same_text(loaded, prompt, done.stdout.strip(), mlx_lm_says(smollm2, adapter, prompt))
