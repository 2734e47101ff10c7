"""`mlx-lora tune` against a grid: its rate and eight others, each trained in full, on validation and test rows.

Rank, targets and steps are given, so that the rate alone is tuned. The grid knows nothing of the rate that `tune`
begins with. Test rows judge both; `tune` doesn't read them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.bench.inputs import Inputs
from tests.bench.process import ROOT, Failed, side

GRID = [2.5e-4 * 2**power for power in range(8)]
# Of `tune`, by task; fifteen would be its default.
MINUTES = {"notes": 5, "sql": 5}
FIXED = ["adapter.rank=8", "adapter.targets=attention", "train.save_every=null"]


def measure(inputs: Inputs, quick: bool) -> dict[str, Any]:
    """What the command found on each task, and the losses of the grid."""
    steps, every = (24, 24) if quick else (300, 60)
    settings = [*FIXED, f"train.iters={steps}", f"train.eval_every={every}"]
    base, tasks = str(ROOT / "data" / "base"), ROOT / "data" / "tasks"
    return {
        f"embedded, {name}": _task(inputs, name, base, str(tasks / name), settings, quick)
        for name in (("notes",) if quick else MINUTES)
    }


def _task(inputs: Inputs, name: str, model: str, data: str, settings: list[str], quick: bool) -> dict[str, Any]:
    minutes = 2 if quick else MINUTES[name]
    command = ["tune", "--model", model, "--data", data, "--name", name, "--minutes", str(minutes), "--json", *settings]
    done = subprocess.run(
        [sys.executable, "-m", "mlx_lora", *command],
        stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"MLX_LORA_HOME": str(inputs.folder / "home")},
    )  # fmt: skip
    if done.returncode:
        raise Failed(f"tune ended with {done.returncode}")
    told = json.loads(done.stdout.splitlines()[-1])
    rate = told["settings"]["train.learning_rate"]
    print(f"  {name}: {rate:g} after {len(told['trials'])} trials, {told['seconds']:.0f} s", flush=True)
    full = side("tuning", model=model, data=data, settings=settings, rates=[rate, *(GRID[::4] if quick else GRID)])
    losses = full["losses"]
    mine, grid = losses[f"{rate:g}"], {key: losses[key] for key in losses if float(key) in GRID}
    best = {of: min(each[of] for each in grid.values() if each[of] is not None) for of in ("valid", "test")}
    kept = ("seconds", "rows", "lost", "steps")
    return {
        "rate": rate, "default": told["trials"][0]["rate"], **{key: told[key] for key in kept},
        "trials": [{key: trial[key] for key in ("rate", "steps", "loss", "seconds")} for trial in told["trials"]],
        "losses": mine, "grid": grid, "behind": {of: mine[of] - best[of] for of in best},
        "grid_seconds": full["all_seconds"],
    }  # fmt: skip


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    title = (
        f"`mlx-lora tune` within {' and '.join(map(str, MINUTES.values()))} minutes, its rate trained in full "
        "against the best of eight rates from 2.5e-4 to 3.2e-2, each trained in full: nats a token behind that best, "
        "on the rows that chose and on others."
    )
    rows = [
        [name, f"{found['default']:g}", f"{found['rate']:g}", len(found["trials"]), found["seconds"] / 60,
         found["losses"]["valid"], found["behind"]["valid"], found["losses"]["test"], found["behind"]["test"]]
        for name, found in figures.items()
    ]  # fmt: skip
    header = ["base, task", "default rate", "tuned rate", "trials", "minutes", "validation loss", "behind the grid",
              "test loss", "behind the grid"]  # fmt: skip
    rates = sorted({rate for found in figures.values() for rate in found["grid"]}, key=float)
    of_grid = [
        [name, *((found["grid"].get(rate) or {}).get("test") for rate in rates)] for name, found in figures.items()
    ]
    return [(title, header, rows), ("Test loss of the grid, by rate.", ["base, task", *rates], of_grid)]
