"""Validation loss by learning rate: what `train.learning_rate: auto` rests on.

LoRA of rank 8 on attention, 80 steps of the default 4 rows: the embedded base on its three tasks, SmolLM2-135M on
WikiSQL and on 80 support questions with five labels, Gemma 3 270M on the latter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.bench.inputs import Inputs
from tests.bench.process import ROOT, side

RATES = {
    "embedded": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2],
    "SmolLM2": [3e-4, 1e-3, 2e-3, 4e-3, 8e-3],
    "Gemma 3": [3e-4, 1e-3, 2e-3, 4e-3, 8e-3],
}
HIDDEN = {"embedded": 128, "SmolLM2": 576, "Gemma 3": 640}
SETTINGS = ["train.iters=80", "train.save_every=null"]


def measure(inputs: Inputs, quick: bool) -> dict[str, Any]:
    """Losses by base and task, a rate each."""
    support = _support(inputs.folder)
    tasks = [("embedded", str(ROOT / "data" / "base"), task, str(ROOT / "data" / "tasks" / task), []) for task in
             ("mail", "notes", "sql")]  # fmt: skip
    if not quick:
        plain = ["data.template=none", "data.max_seq_length=512"]
        tasks += [("SmolLM2", inputs.float32, "support", support, [])]
        tasks += [("SmolLM2", inputs.float32, "WikiSQL", inputs.wikisql, plain)]
        tasks += [("Gemma 3", inputs.gemma, "support", support, [])]
    found: dict[str, Any] = {}
    for base, model, task, data, settings in tasks:
        figures = side("training", model=model, data=data, settings=[*SETTINGS, *settings], rates=RATES[base])
        print(f"  {base}, {task}: {figures}", flush=True)
        found[f"{base}, {task}"] = {"hidden": HIDDEN[base], **figures}
    return found


def _support(folder: Path) -> str:
    """The labelled questions with the held-out ones as validation rows, which would be eight otherwise."""
    source, out = ROOT / "data" / "tasks" / "support", folder / "support"
    out.mkdir()
    for name, of in (("train", "train"), ("valid", "test")):
        rows = [json.loads(line) for line in (source / f"{of}.jsonl").read_text().splitlines()]
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(out)


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    rates = sorted({float(rate) for found in figures.values() for rate in found["losses"]})
    title = "Validation loss in nats after 80 steps of 4 rows, by learning rate: LoRA of rank 8 on attention, alpha 16."
    rows = [
        [name, found["hidden"], *(found["losses"].get(f"{rate:g}") for rate in rates)]
        for name, found in figures.items()
    ]
    return [(title, ["base, task", "hidden size", *(f"{rate:g}" for rate in rates)], rows)]
