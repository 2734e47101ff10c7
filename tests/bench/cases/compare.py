"""`mlx-lora study compare` on SmolLM2 and WikiSQL: methods of `recipes/compare` on the same rows, at the better rate.

The command is the user's own; what it prints as JSON is the record, and its plot is kept beside it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.bench import results
from tests.bench.inputs import Inputs
from tests.bench.process import ROOT, Failed

RECIPES = ("lora", "bottleneck", "bitfit", "full-last2")
RATES = ("1e-3", "1e-2")
SETTINGS = ("data.template=none", "data.max_seq_length=512", "train.batch_size=4")
ITERS, ROWS = 20, 30


def measure(inputs: Inputs, quick: bool) -> dict[str, Any]:
    """What the command reports: a line for the base, and one for each recipe."""
    words = [f"recipes/compare/{name}.yaml" for name in (RECIPES[:1] if quick else RECIPES)]
    words += [f"model={inputs.float16}", f"data.path={fewer(inputs)}", *SETTINGS, f"train.iters={ITERS}"]
    words += [option for rate in RATES for option in ("--learning-rate", rate)]
    out = inputs.folder / "compared"
    command = [sys.executable, "-m", "mlx_lora", "study", "compare", *words]
    done = subprocess.run(
        [*command, "--name", "wikisql", "--out", str(out), "--json"],
        stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"MLX_LORA_HOME": str(inputs.folder / "home")},
    )  # fmt: skip
    if done.returncode:
        raise Failed(f"study compare ended with {done.returncode}")
    found = json.loads(done.stdout.splitlines()[-1])
    if not quick:
        shutil.copyfile(found["plot"], results.FOLDER / "compare.png")
    kept = ("recipe", "method", "learning_rate", "parameters", "loss", "exact_match", "seconds", "peak_memory_bytes",
            "adapter_bytes", "error")  # fmt: skip
    lines = [{key: line[key] for key in kept} for line in found["results"]]
    return {"iters": ITERS, "rows": ROWS, "results": lines, "verdict": " ".join(found["verdict"])}


def fewer(inputs: Inputs) -> Path:
    """WikiSQL with the first ROWS rows to validate on and to judge by."""
    folder = inputs.folder / "fewer"
    folder.mkdir()
    for name, most in (("train", None), ("valid", ROWS), ("test", ROWS)):
        lines = (Path(inputs.wikisql) / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:most]))
    return folder


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    rows = [
        [line["recipe"], line["learning_rate"], f"{line['parameters']:,}", line["loss"], line["exact_match"],
         line["seconds"], line["peak_memory_bytes"] and line["peak_memory_bytes"] / 1e9,
         line["adapter_bytes"] and line["adapter_bytes"] / 1e6]
        for line in figures["results"]
    ]  # fmt: skip
    title = (
        f"SmolLM2-135M on WikiSQL: {figures['iters']} steps of four rows, one seed, the better of two learning rates "
        f"by validation, judged by {figures['rows']} test rows. {figures['verdict']}"
    )
    header = ["recipe", "rate", "parameters", "loss", "exact match", "s", "peak GB", "adapter MB"]
    return [(title, header, rows)]
