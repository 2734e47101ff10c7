"""Our reading and encoding of data files, without a model."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

from mlx_lora.config import Data
from mlx_lora.data.encode import Encoder
from mlx_lora.data.fit import encode_file
from mlx_lora.data.prepare import prepare
from mlx_lora.models import template
from mlx_lora.models.open import load_tokenizer
from tests.bench.worker import process_bytes

WORDS = (
    "the river stone garden of what is where lies and it name called number in old house water light two was said "
    "they have one from which their people over time year good work first last long great little own other right big "
    "high different small large next early young important few public bad same able money story fact month lot study"
).split()
ROW_BYTES = 2000


def large_file(*, model: str, folder: str, size: int) -> dict[str, Any]:
    """Prepare a file of `size` bytes: the peak of this process and of the workers that render."""
    import resource
    import sys

    file, draw = Path(folder) / f"{size}.jsonl", random.Random(0)
    with open(file, "w") as stream:
        while stream.tell() < size:
            answer = " ".join(draw.choices(WORDS, k=ROW_BYTES // 8))
            row = {"messages": [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": answer}]}
            stream.write(json.dumps(row) + "\n")
    tokenizer = load_tokenizer(model)
    start = time.perf_counter()
    prepared = prepare(file, Data(valid_fraction=0), tokenizer)
    seconds = time.perf_counter() - start
    file.unlink()
    count = sum(worker.process is not None for worker in template._workers)
    template.stop_workers()  # waited for, so their peak is known
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "rows": len(prepared.train),
        "seconds_to_read": seconds,
        "megabytes_per_second": size / 1e6 / seconds,
        "worker_bytes": worker * count,
        "peak_bytes": process_bytes() + worker * count,
    }


def short_conversations(*, model: str, count: int) -> dict[str, Any]:
    """Conversations a second, once the workers run and the template is compiled."""
    import tempfile

    encoder = Encoder(load_tokenizer(model), Data())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "short.jsonl"
        _write(file, 100, 0)
        encode_file(file, encoder)
        _write(file, count, 1)
        start = time.perf_counter()
        encoded = encode_file(file, encoder)
        seconds = time.perf_counter() - start
    assert len(encoded.rows) == count and not encoded.problems
    return {"per_second": count / seconds}


def _write(file: Path, count: int, seed: int) -> None:
    """`count` conversations of about thirty words."""
    draw = random.Random(seed)
    with open(file, "w") as stream:
        for _ in range(count):
            question, answer = (" ".join(draw.choices(WORDS, k=draw.randint(5, 15))) for _ in range(2))
            row = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            stream.write(json.dumps(row) + "\n")
