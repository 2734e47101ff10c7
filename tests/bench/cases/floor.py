"""Our float32 step against its bare matrix products, and what the rest of it is: four WikiSQL rows, completion loss."""

from __future__ import annotations

from typing import Any

from tests.bench.inputs import Inputs
from tests.bench.process import side


def measure(inputs: Inputs, quick: bool) -> dict[str, Any]:
    """Seconds of the step, of its products and of each kind of the rest, all in one process."""
    options = {"model": inputs.float16, "rows": inputs.rows("completion"), "steps": 3 if quick else 7}
    found = side("ours_floor", **options)
    print(f"  {found['step']:.3f} s, {found['step'] / found['products']:.2f} times the products alone", flush=True)
    return {**found, "ratio": found["step"] / found["products"]}


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    step = figures["step"]
    parts = {"matrix products": figures["products"], **figures["rest"]}
    parts["everything else"] = step - sum(parts.values())
    rows = [[name, seconds, seconds / step] for name, seconds in {**parts, "the step": step}.items()]
    title = (
        f"Where the time of a float32 step goes: {figures['ratio']:.2f} times the floor of bare matrix products "
        f"at {figures['operations'] / figures['products'] / 1e9:.0f} GFLOP/s."
    )
    return [(title, ["part", "s", "share"], rows)]
