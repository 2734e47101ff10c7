"""What the benchmarks train: SmolLM2-135M-Instruct as float16 and 4-bit directories, and WikiSQL as encoded rows.

Made as a user would, with the command line, in a temporary folder, from the same download that the real tests use;
only what a benchmark asks for is made. Rows are encoded once, so that every side trains on the same tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.bench.process import ROOT, Failed, side

SHARED = ROOT.parent / "shared"
# 97 tokens are 96 positions, which no side has to pad
TOKENS = 97


class Inputs:
    """A folder that lives as long as the `with` block."""

    def __enter__(self) -> Inputs:
        self._temporary = tempfile.TemporaryDirectory(prefix="mlx-lora-bench-")
        self.folder = Path(self._temporary.name)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._temporary.cleanup()

    @cached_property
    def gguf(self) -> str:
        """SmolLM2's GGUF file, in Q4_1."""
        cache = _cache()
        tool = SHARED / "tools" / "get_smollm2.py"
        if not tool.is_file():
            raise Failed(f"{tool.name} is absent: this benchmark needs SmolLM2")
        found = subprocess.run([sys.executable, str(tool), str(cache)], check=True, stdout=subprocess.PIPE, text=True)
        return found.stdout.strip().splitlines()[-1]

    @cached_property
    def gemma(self) -> str:
        """Gemma 3 270M as float32, from its GGUF file in Q4_K_M."""
        file = _cache() / "gemma-3-270m-q4_k_m.gguf"
        if not file.is_file():
            raise Failed(f"{file.name} is absent: `pytest -m real tests/real/test_gguf_gemma3.py` brings it")
        return self._made("import-gguf", str(file), "gemma3", "--dtype", "float32")

    @cached_property
    def float16(self) -> str:
        """SmolLM2 as float16."""
        return self._made("import-gguf", self.gguf, "smollm2", "--dtype", "float16")

    @cached_property
    def float32(self) -> str:
        """SmolLM2 as float32."""
        return self._made("import-gguf", self.gguf, "smollm2-float32", "--dtype", "float32")

    @cached_property
    def quickstart(self) -> str:
        """The embedded base at 4 bits; its three adapters are in the home, which the sides have too from now on."""
        os.environ["MLX_LORA_HOME"] = str(self.folder / "home")
        subprocess.run(
            [sys.executable, "-m", "mlx_lora", "quickstart"], check=True, stdout=subprocess.DEVNULL, cwd=ROOT
        )
        return "quickstart-base"

    @cached_property
    def as_published(self) -> str:
        """The same as its file packs it: 4 bits in groups of 32, with float16 zero-points."""
        return self._made("import-gguf", self.gguf, "smollm2-published")

    @cached_property
    def four_bit(self) -> str:
        """The same at 4 bits in groups of 64."""
        return self._made("quantize", self.float16, "smollm2-4bit", "--bits", "4", "--group-size", "64")

    def model(self, bits: int | None) -> str:
        """Its directory: float16 (None), or 4-bit."""
        return self.float16 if bits is None else self.four_bit

    @cached_property
    def wikisql(self) -> str:
        """A folder of prompts and completions: the answer follows the last "A: " of each text."""
        source = SHARED / "data" / "wikisql"
        if not source.is_dir():
            raise Failed("WikiSQL is absent: this benchmark needs it")
        folder = self.folder / "wikisql"
        folder.mkdir()
        for name in ("train", "valid", "test"):
            with open(source / f"{name}.jsonl") as rows, open(folder / f"{name}.jsonl", "w") as out:
                for row in rows:
                    prompt, mark, completion = json.loads(row)["text"].rpartition("\nA: ")
                    out.write(json.dumps({"prompt": prompt + mark, "completion": completion}) + "\n")
        return str(folder)

    def rows(self, mask: str, count: int = 4) -> str:
        """A file of `count` rows of TOKENS tokens, with loss on `mask`: all or completion."""
        file = self.folder / f"rows-{mask}-{count}.json"
        if not file.exists():
            side(
                "ours.encode",
                model=self.float16,
                data=self.wikisql,
                mask=mask,
                tokens=TOKENS,
                count=count,
                out=str(file),
            )
        return str(file)

    def _made(self, command: str, source: str, name: str, *options: str) -> str:
        out = self.folder / name
        words: list[Any] = [sys.executable, "-m", "mlx_lora", command, source, out, *options]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        return str(out)


def _cache() -> Path:
    return Path(os.environ.get("MLX_LORA_TEST_CACHE", "~/.cache/mlx-lora-tests")).expanduser()
