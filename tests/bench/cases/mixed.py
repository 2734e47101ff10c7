"""Requests at once on SmolLM2-135M, each with its own adapter of rank 16 on all linears, from float16 and from 4 bits.

Ratios are of the fastest batches of those that ran in turn in one process. On a processor everything computes in
float32, and packed weights are unpacked once. Prompts have 32 tokens, answers 16.
"""

from __future__ import annotations

from typing import Any

from tests.bench.inputs import Inputs
from tests.bench.process import side

BASES: dict[str, int | None] = {"half precision": None, "4-bit": 4}
ROWS = (8, 16)


def measure(inputs: Inputs, quick: bool) -> dict[str, Any]:
    """Figures by base and number of rows, of a hundred adapters held, and of mlx_lm.server."""
    runs, found = 2 if quick else 8, dict[str, Any]()
    for base, bits in BASES.items():
        for count in ROWS:
            found[f"{base}, {count} rows"] = side("mixing.rows", model=inputs.model(bits), count=count, runs=runs)
            print(f"  {base}, {count} rows: {found[f'{base}, {count} rows']}", flush=True)
    found["held"] = side("mixing.held", model=inputs.model(None), runs=runs)
    print(f"  held: {found['held']}", flush=True)
    found["mlx_lm.server"] = side("mixing_server.in_turn", model=inputs.model(None))
    print(f"  mlx_lm.server: {found['mlx_lm.server']}", flush=True)
    return found


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    rows = [
        [
            name,
            speed["mixed"],
            speed["same"],
            speed["single"],
            run["mixed_of_same"],
            run["mixed_of_single"],
        ]  # fmt: skip
        for name, run in figures.items()
        if "mixed_of_same" in run
        for speed in [run["tokens_per_second"]]
    ]
    theirs, held = figures["mlx_lm.server"]["tokens_per_second"], figures["held"]
    rows.append(
        [f"mlx_lm.server, {figures['mlx_lm.server']['rows']} rows", theirs["mixed"], theirs["same"]] + [None] * 3
    )
    title = "Tokens a second of requests at once, SmolLM2-135M on a processor: an adapter for each, or one for all."
    header = ["base, rows", "own adapters", "one adapter", "one by one", "own / one adapter", "own / one by one"]
    sizes = held["adapter_bytes"]
    beside = [
        [f"{count} held", held["tokens_per_second"][name], sizes[name] / 1e9, ratio]
        for name, count, ratio in (("few", 8, None), ("many", 100, held["many_over_few"]))
    ]
    note = "Eight of those requests where eight adapters are held, and where a hundred are, one of them of rank 64."
    return [(title, header, rows), (note, ["adapters", "tokens/s", "adapters, GB", "time / 8 held"], beside)]
