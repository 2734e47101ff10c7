"""Reading and encoding: memory by the size of the file, and conversations a second by the chat template.

The large file has 2 GB (`--quick`: 60 MB) of rows of 2 kB. Memory is this process's and its workers', templates
included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.inputs import SHARED, Inputs
from tests.bench.process import Failed, side

SMALL, LARGE, QUICK = 20 * 10**6, 2 * 10**9, 60 * 10**6
CONVERSATIONS, RUNS = 20000, 3


def measure(inputs: Inputs, quick: bool) -> dict[str, Any]:
    """Figures by part: `memory` by the bytes of the file, `rate` by the model."""
    sizes = (SMALL, QUICK if quick else LARGE)
    memory = {}
    with tempfile.TemporaryDirectory(prefix="mlx-lora-encode-", dir=inputs.folder) as folder:
        for size in sizes:
            memory[str(size)] = side("encoding.large_file", model=inputs.float16, folder=folder, size=size)
            print(f"  {size / 1e6:,.0f} MB: {memory[str(size)]}", flush=True)
    rate = {}
    for name, model in (("SmolLM2", inputs.float16), ("Qwen3", _tokenizer("qwen3"))):
        found = [side("encoding.short_conversations", model=model, count=CONVERSATIONS) for _ in range(RUNS)]
        rate[name] = sorted(run["per_second"] for run in found)[RUNS // 2]
        print(f"  {name}: {rate[name]:,.0f} conversations a second", flush=True)
    return {"memory": memory, "rate": rate}


def _tokenizer(name: str) -> str:
    """The directory of a real tokenizer with its chat template."""
    cache = Path(os.environ.get("MLX_LORA_TEST_CACHE", "~/.cache/mlx-lora-tests")).expanduser() / "tokenizers"
    tool = SHARED / "tools" / "get_tokenizers.py"
    if not tool.is_file():
        raise Failed(f"{tool.name} is absent: this benchmark needs the tokenizer of {name}")
    subprocess.run([sys.executable, str(tool), str(cache), name], check=True, stdout=subprocess.DEVNULL)
    config = cache / name / "config.json"
    config.write_text(json.dumps({"model_type": "llama"}))  # a tokenizer alone is no model directory
    return str(cache / name)


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    rows = [
        [f"{int(size) / 1e6:,.0f} MB", run["rows"], run["peak_bytes"] / 1e6, run["worker_bytes"] / 1e6,
         run["seconds_to_read"], run["megabytes_per_second"]]
        for size, run in figures["memory"].items()
    ]  # fmt: skip
    header = ["file", "rows", "peak MB", "of it template workers", "s", "MB a second"]
    title = "Reading and encoding a file of 2 kB rows through SmolLM2's chat template, rows written to disk."
    rates = [[name, per_second] for name, per_second in figures["rate"].items()]
    return [
        (title, header, rows),
        ("Short conversations (one question, one answer) read and encoded, median of three runs.",
         ["chat template", "conversations a second"], rates),
    ]  # fmt: skip
