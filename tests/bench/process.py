"""One side of a comparison in a process of its own, and several sides in turn.

    side("ours", model=…)  ->  python -m tests.bench.worker ours '{"model": …}'  ->  a dictionary

The parent imports neither MLX nor torch: it must stay small and use no cores while a side is timed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]

Side = tuple[str, dict[str, Any]]


class Failed(RuntimeError):
    """A side ended with an error, or two sides disagree about what they compute."""


def side(name: str, **options: Any) -> dict[str, Any]:
    """Run one function of `sides` in a fresh process and return what it measured."""
    command = [sys.executable, "-m", "tests.bench.worker", name, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise Failed(f"{name} {options} failed:\n{done.stderr[-4000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def alternate(sides: dict[str, Side], *, runs: int) -> dict[str, dict[str, Any]]:
    """Every side once, then every side again, `runs` times; the summary of each by label."""
    measured: dict[str, list[dict[str, Any]]] = {label: [] for label in sides}
    for _ in range(runs):
        for label, (name, options) in sides.items():
            measured[label].append(side(name, **options))
            print(f"  {label}: {line(measured[label][-1])}", flush=True)
    return {label: summary(found) for label, found in measured.items()}


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over all measured steps of all runs, the highest of the peaks, the rest as the first run said."""
    seconds = [value for run in found for value in run["seconds"]]
    peaks = {key: max(run[key] for run in found) for key in ("peak_bytes", "process_bytes") if key in found[0]}
    kept = {key: value for key, value in found[0].items() if key not in ("seconds", *peaks)}
    return {"seconds": median(seconds), **peaks, **kept, "runs": len(found), "steps": len(seconds)}


def line(run: dict[str, Any]) -> str:
    """One run for the screen."""
    peak = f", peak {run['peak_bytes'] / 1e9:.3f} GB" if run.get("peak_bytes") else ""
    process = f", process {run['process_bytes'] / 1e9:.3f} GB" if run.get("process_bytes") else ""
    return f"{median(run['seconds']):.3f} s{peak}{process}"
