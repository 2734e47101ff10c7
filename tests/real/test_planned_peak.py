"""The plan of a real model beside the peak of its own training, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlx_lora.models.open import load_tokenizer
from tests.real.conftest import Shell

pytestmark = pytest.mark.real


@pytest.fixture(scope="session")
def long_rows(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A file for each number of positions, with rows of exactly that many, every token with loss."""
    tokenizer = load_tokenizer(smollm2)
    words = [" the", " a", " of", " to", " and", " in", " is", " it"]
    assert all(len(tokenizer.encode(word)) == 1 for word in words)
    generator, folder, files = np.random.default_rng(0), tmp_path_factory.mktemp("rows"), {}
    for positions in (512,):
        files[positions] = folder / f"{positions}.jsonl"
        # the end token is added to a text
        texts = ["".join(generator.choice(words, positions)) for _ in range(3)]
        files[positions].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return files


@pytest.mark.parametrize(
    ("positions", "checkpoint", "bits"),
    [(512, "on", 4)],
)
def test_a_plan_is_within_a_tenth_of_the_measured_peak(
    positions: int, checkpoint: str, bits: int | None, shell: Shell, smollm2: Path, long_rows: dict[int, Path]
) -> None:
    name = f"planned-{positions}-{checkpoint}-{bits}"
    words = ["--model", smollm2, "--data", long_rows[positions], f"train.grad_checkpoint={checkpoint}",
             "data.valid_fraction=0", "data.template=none", "train.batch_size=1", "train.iters=3"]  # fmt: skip
    words += [f"quantize.bits={bits}"] if bits else []
    planned = shell.json("plan", *words)
    assert planned["micro_batch"] == {"lines": 1, "width": positions, "trained": positions}
    trained = shell.json("train", *words, "--name", name)
    assert planned["peak_memory_bytes"] == pytest.approx(trained["peak_memory_bytes"], rel=0.1)
