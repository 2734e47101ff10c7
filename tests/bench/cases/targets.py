"""`adapter.targets`: attention, the default, against every linear layer; 80 steps with the other defaults.

The case for either is the loss on test rows beside the seconds of the loop and the bytes of the adapter.
"""

from __future__ import annotations

from typing import Any

from tests.bench.inputs import Inputs
from tests.bench.process import ROOT, side

TARGETS = ("attention", "all-linear")
STEPS = 80


def measure(inputs: Inputs, quick: bool) -> dict[str, Any]:
    """Figures by task and targets."""
    embedded, tasks = str(ROOT / "data" / "base"), ROOT / "data" / "tasks"
    asked = [(f"embedded, {name}", embedded, str(tasks / name)) for name in ("mail", "notes", "sql")]
    if not quick:
        asked += [("SmolLM2, support", inputs.float32, str(tasks / "support"))]
        asked += [("SmolLM2, WikiSQL", inputs.float32, inputs.wikisql)]
    found: dict[str, Any] = {}
    for name, model, data in asked:
        found[name] = {
            targets: side(
                "defaults", model=model, data=data, exact=False,
                settings=[f"adapter.targets={targets}", f"train.iters={STEPS}"],
            )
            for targets in TARGETS
        }  # fmt: skip
        print(f"  {name}: {found[name]}", flush=True)
    return found


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    title = (
        f"Attention, the default target, against every linear layer: {STEPS} steps with the other defaults, loss on "
        "test rows in nats per token, seconds of the loop with its evaluations."
    )
    rows = [
        [f"{task}, {targets}", run["parameters"], run["loss"], run["all_seconds"]]
        for task, sides in figures.items()
        for targets, run in sides.items()
    ]
    return [(title, ["base, task, targets", "parameters", "loss", "s"], rows)]
