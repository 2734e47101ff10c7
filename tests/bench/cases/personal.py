"""Personal data: recall and false alarms by kind on a synthetic set of ours, and the speed on text without any."""

from __future__ import annotations

import time
from typing import Any

from mlx_lora import paths
from mlx_lora.data.personal import find
from tests.bench.inputs import Inputs
from tests.data.personal_set import COUNT, scores

PIECE = 2000
# The patterns were written beside seed 0.
SEED = 1


def measure(inputs: Inputs, quick: bool) -> dict[str, Any]:
    """Shares by kind, and megabytes a second in pieces of two thousand characters."""
    count = COUNT // 4 if quick else COUNT
    sets = {}
    for name, hard in (("common", False), ("hard", True)):
        sets[name] = {
            kind: {"recall": score.recall, "false_alarms": score.false_alarms}
            for kind, score in scores(SEED, count, hard=hard).items()
        }
    files = [paths.bundled("data", "tasks", task, "train.jsonl") for task in ("notes", "mail", "sql")]
    text = "".join(file.read_text() for file in files) * (4 if quick else 30)
    pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    seconds = []
    for _ in range(3):
        start = time.process_time()
        found = sum(len(find(piece)) for piece in pieces)
        seconds.append(time.process_time() - start)
    speed = len(text.encode()) / 1e6 / sorted(seconds)[1]
    return {"count": count, "sets": sets, "megabytes_per_second": speed, "found": found}


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    count, sets, speed = figures["count"], figures["sets"], figures["megabytes_per_second"]
    title = (
        f"Personal data in synthetic sets of ours, {count} texts with some and {count} that only look like it for each "
        "kind. The common set has the forms that the patterns are made for; the hard set has forms written seldom, or "
        f"that can't be told by their form alone. Text without any is read at {speed:.0f} MB a second, on one core."
    )
    columns = [(name, share) for name in ("common", "hard") for share in ("recall", "false_alarms")]
    rows = [[kind, *(f"{sets[name][kind][share]:.1%}" for name, share in columns)] for kind in sets["common"]]
    return [(title, ["kind", "recall", "false alarms", "recall, hard", "false alarms, hard"], rows)]
