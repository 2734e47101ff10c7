"""Predicted peaks beside measured ones: a run of the trainer, the arithmetic on its shapes, and the fit of the two."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import attach
from mlx_lora.config import Adapter
from mlx_lora.data.batch import padded
from mlx_lora.machine import device
from mlx_lora.models.load import load
from mlx_lora.models.shapes import network, stored_dtype
from mlx_lora.train.budget.costs import Costs, costs
from mlx_lora.train.budget.predict import COEFFICIENTS, Coefficients, Micro, predict
from tests.bench.sides import ours
from tests.bench.sides import rows as plain
from tests.fixed import fixed

PACKED = {"mode": "affine", "bits": 4, "group_size": 64}
# A coefficient is tried at these multiples of what it is, in turn with the others, this many times; what decides
# nothing stays as it is.
STEPS, ROUNDS = (1.0, 0.9, 0.96, 1.04, 1.1), 6
Run = dict[str, Any]


def run(
    *,
    model: str | None,
    config: dict[str, Any] | None,
    bits: int | None,
    targets: str,
    rank: int,
    length: int,
    checkpoint: str,
) -> Run:
    """The highest peak of three steps on one random row with loss on every token: of a model, or of a shape."""
    if model is not None:
        loaded = load(model)
        base, config = loaded.model, {key: loaded.config[key] for key in loaded.config if "quant" not in key}
    else:
        assert config is not None
        base = network(config, quantization=PACKED if bits else None, gpu=device.on_gpu())
        for _, array in tree_flatten(base.parameters()):
            mx.eval(array)
        base.eval()
    attach(base, Adapter(targets=targets, rank=rank))
    mx.clear_cache()
    rows = plain.random(config["vocab_size"], 1, length, "all")
    found = ours.train(base, rows, 1, grad_checkpoint=checkpoint, optimizer="adamw")
    return {"config": config, "seconds": found["seconds"], "peak_bytes": found["peak_bytes"]}


def predicted(*, runs: list[Run]) -> dict[str, Any]:
    """What today's arithmetic says of each run."""
    return {"predicted": [predict(*_work(run), recompute=_recompute(run)).total for run in runs]}


def fit(*, runs: list[Run]) -> dict[str, Any]:
    """The coefficients with the smallest error over the runs: the sum of its squares, and of the largest one's."""
    work = [(*_work(run), _recompute(run), run["peak_bytes"]) for run in runs]

    def error(using: Coefficients) -> float:
        errors = [math.log(predict(c, m, recompute=again, using=using).total / peak) ** 2 for c, m, again, peak in work]
        return sum(errors) + len(errors) * max(errors)

    best = COEFFICIENTS
    for _ in range(ROUNDS):
        for name, value in asdict(best).items():
            tried = [replace(best, **{name: round(value * step, 3)}) for step in STEPS]
            best = min(tried, key=error)
    totals = [predict(c, m, recompute=again, using=best).total for c, m, again, _ in work]
    return {"coefficients": asdict(best), "predicted": totals}


def _work(run: Run) -> tuple[Costs, Micro]:
    model = network(run["config"], quantization=PACKED if run["bits"] else None, gpu=False)
    attach(model, Adapter(targets=run["targets"], rank=run["rank"]))
    dtype = device.activation_dtype(stored_dtype(run["config"]))
    trained = run.get("trained", run["length"])
    micro = Micro(1, padded(run["length"]), padded(trained))
    return costs(model, fixed(optimizer=run.get("optimizer", "adamw")), dtype=dtype, gpu=False), micro


def _recompute(run: Run) -> bool:
    return bool(run["checkpoint"] == "on")


def shapes(*, configs: dict[str, dict[str, Any]], length: int, coefficients: dict[str, float]) -> dict[str, Any]:
    """Peaks by arithmetic alone: 4 bits, one row, layers computed again, on a GPU; for QLoRA's adapter and for ours."""
    adapters = {"paper": Adapter(targets="all-linear", rank=64), "default": Adapter()}
    found: dict[str, Any] = {}
    for size, config in configs.items():
        found[size] = {}
        for name, adapter in adapters.items():
            model = network(config, quantization=PACKED, gpu=True)
            attach(model, adapter)
            cost = costs(model, fixed(), dtype=stored_dtype(config), gpu=True)
            parts = predict(cost, Micro(1, length, length), recompute=True, using=Coefficients(**coefficients))
            found[size][name] = {**asdict(parts), "peak_bytes": parts.total}
    return found
