"""What earlier runs on this machine have taught: how far a prediction was off, and how fast it computes.

One small file in the home, `plan.json`, with a few numbers for each kind of run (device, bits of the base, gradient
checkpointing), and for products that were timed. No name of a model, of data or of a run is in it. A file that can't
be read is as good as none.
"""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx

from mlx_lora import paths
from mlx_lora.train.budget import pace
from mlx_lora.train.budget.choose import Experience, Plan
from mlx_lora.train.budget.costs import Costs

# A run counts as much as all before it together. Corrections are clamped to 2×; those of runs that were stopped for
# taking too much, to 8×: to predict too little again would stop the next run as well.
WEIGHT, MOST, MOST_STOPPED = 0.5, 2.0, 8.0


def experience(kind: str) -> Experience:
    """What runs of this kind have taught; nothing, before the first."""
    entry = _read().get(kind)
    try:
        found = Experience(**entry) if isinstance(entry, dict) else Experience()
        return found if 1 / MOST <= found.correction <= MOST_STOPPED and (found.seconds or 0) >= 0 else Experience()
    except TypeError:
        return Experience()


def remember(
    plan: Plan, measured_bytes: int, seconds_per_position: float | None = None, *, stopped: bool = False
) -> None:
    """Let a run's own peak, and the time that a position took in it, correct the next plan of its kind.

    A run that was `stopped` for taking too much has shown a part of its peak: that raises the correction at once, and
    never lowers it.
    """
    before = experience(plan.kind)
    uncorrected = (plan.peak_memory_bytes - plan.fixed) / plan.correction
    ratio = max((measured_bytes - plan.fixed) / uncorrected, 1 / MOST)
    if stopped:
        correction = max(before.correction, min(ratio, MOST_STOPPED))
    else:
        correction = before.correction + WEIGHT * (min(ratio, MOST) - before.correction)
    seconds = before.seconds
    if seconds_per_position is not None:
        here = seconds_per_position / plan.work
        seconds = here if seconds is None else seconds + WEIGHT * (here - seconds)
    _write(_read() | {plan.kind: asdict(Experience(correction, seconds))})


def pace_of_products(costs: Costs) -> float:
    """Seconds of a multiplication in a step over this base, on the device that MLX computes on: timed once, then kept.

    Raises nothing where it can't be kept: it is timed again the next time.
    """
    bits, hidden = costs.bits or 8 * costs.size, costs.hidden
    kind = f"products, {'gpu' if costs.gpu else 'cpu'}, {bits} bits, {hidden} wide"
    known = _read().get(kind)
    if isinstance(known, float) and known > 0:
        return known
    dtype = mx.float32 if costs.size == 4 else mx.float16
    seconds = pace.measured(hidden=hidden, bits=costs.bits, dtype=dtype, gpu=costs.gpu)
    with suppress(OSError):
        _write(_read() | {kind: seconds})
    return seconds


def _file() -> Path:
    return paths.home() / "plan.json"


def _read() -> dict[str, object]:
    try:
        entries = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _write(entries: dict[str, object]) -> None:
    """Whole or not at all, readable by its owner alone."""
    descriptor, name = tempfile.mkstemp(prefix=".plan.", dir=paths.home())
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            json.dump(entries, stream, indent=1, sort_keys=True)
        os.replace(name, _file())
    except BaseException:
        os.unlink(name)
        raise
