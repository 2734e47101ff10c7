"""Personal data: recall and false alarms by kind on a synthetic set of ours, and the speed on text without any."""

from __future__ import annotations

import time
from typing import Any

from mlx_lora import paths
from mlx_lora.data.personal import find
from tests.bench.inputs import Inputs
from tests.data.personal_set import COUNT, scores

PIECE = 2000
# The set that the patterns were written with is seed 0.
SEED = 1


def measure(inputs: Inputs, quick: bool) -> dict[str, Any]:
    """Shares by kind, and megabytes a second in pieces of two thousand characters."""
    count = COUNT // 4 if quick else COUNT
    kinds = {
        kind: {"positives": score.positives, "recall": score.recall, "false_alarms": score.false_alarms}
        for kind, score in scores(SEED, count).items()
    }
    files = [paths.bundled("data", "tasks", task, "train.jsonl") for task in ("notes", "mail", "sql")]
    text = "".join(file.read_text() for file in files) * (4 if quick else 30)
    pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    seconds = []
    for _ in range(3):
        start = time.process_time()
        found = sum(len(find(piece)) for piece in pieces)
        seconds.append(time.process_time() - start)
    return {"kinds": kinds, "megabytes_per_second": len(text.encode()) / 1e6 / sorted(seconds)[1], "found": found}


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    kinds = figures["kinds"]
    count = next(iter(kinds.values()))["positives"]
    speed = f"{figures['megabytes_per_second']:.0f} MB a second"
    title = (
        f"Personal data in a synthetic set of ours: {count} texts with some, {count} that only look like it, for each "
        f"kind. Text without any is read at {speed}, on one core."
    )
    rows = [[kind, f"{found['recall']:.1%}", f"{found['false_alarms']:.1%}"] for kind, found in kinds.items()]
    return [(title, ["kind", "recall", "false alarms"], rows)]
