"""Training with `--model`, `--data` and `--name` alone, as the defaults are and as they were.

Before, the defaults were one epoch at 2e-4, evaluated at its end; those settings are given by name here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.bench import results
from tests.bench.inputs import Inputs
from tests.bench.process import ROOT, side

BEFORE = ["train.learning_rate=2e-4", "train.epochs=1", "train.eval_every=null", "train.patience=null"]
FEW = 50
# As long as all the others together: measured by itself, with `--only`.
FURTHER = ("SmolLM2, WikiSQL",)


def measure(inputs: Inputs, quick: bool, only: str | None = None) -> dict[str, Any]:
    """Figures by task, `before` and `now`. `only` measures one of FURTHER, the others are those on record."""
    if only is not None:
        return results.read()["defaults"]["figures"] | {only: _task(only, inputs.float32, inputs.wikisql, exact=False)}
    tasks = [(f"embedded, {name}", str(ROOT / "data" / "base"), str(ROOT / "data" / "tasks" / name), True)
             for name in ("mail", "notes", "sql")]  # fmt: skip
    if not quick:
        tasks += [
            ("SmolLM2, 80 support questions", inputs.float32, str(ROOT / "data" / "tasks" / "support"), True),
            (f"SmolLM2, {FEW} rows of WikiSQL", inputs.float32, _few(inputs), False),
        ]
    return {name: _task(name, model, data, exact=exact) for name, model, data, exact in tasks}


def _task(name: str, model: str, data: str, *, exact: bool) -> dict[str, Any]:
    found = {
        label: side("defaults", model=model, data=data, settings=settings, exact=exact)
        for label, settings in (("before", BEFORE), ("now", []))
    }
    print(f"  {name}: {found}", flush=True)
    return found


def _few(inputs: Inputs) -> str:
    """The first rows of WikiSQL, some of which are set aside to validate, and its test rows."""
    folder = inputs.folder / "few"
    folder.mkdir()
    for name, most in (("train", FEW), ("test", None)):
        lines = (Path(inputs.wikisql) / f"{name}.jsonl").read_text().splitlines()[:most]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(json.loads(line)) + "\n" for line in lines))
    return str(folder)


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    title = (
        "Loss on test rows in nats per token, and the share answered exactly, after training with nothing but model, "
        "data and name: as the defaults are, and as they were (one epoch at 2e-4, evaluated at its end). The gain over "
        "the base is an interval of 95 %, as `verdict` has it."
    )
    rows = [
        [f"{task}, {label}", run["rows"], run["steps"], run["base_loss"], run["loss"],
         f"{run['gain'][0]:.3g} to {run['gain'][1]:.3g}", run["base_exact"], run["exact"]]
        for task, labels in figures.items()
        for label, run in labels.items()
    ]  # fmt: skip
    header = ["base, task, defaults", "rows", "steps", "base loss", "loss", "gain", "base exact", "exact"]
    return [(title, header, rows)]
