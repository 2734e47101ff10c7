"""What NF4 and MLX's affine mode cost a real model: bits a weight, perplexity and KL on WikiSQL, whoever wins."""

from __future__ import annotations

from typing import Any

from tests.bench.inputs import Inputs
from tests.bench.process import side

ROWS = 12
# In the order of their bits; SmolLM2's 576 columns have no groups of 128.
SETTINGS: tuple[dict[str, Any], ...] = (
    {"mode": "nf4", "double_quant": True},
    {"mode": "nf4", "group_size": 32, "double_quant": True},
    {"mode": "nf4"},
    {"mode": "affine", "group_size": 64},
    {"mode": "nf4", "group_size": 32},
    {"mode": "affine", "group_size": 32},
)


def measure(inputs: Inputs, quick: bool) -> dict[str, Any]:
    """The account of every mode, and the perplexity of the model in half precision."""
    found = []
    for settings in SETTINGS[:1] if quick else SETTINGS:
        found.append(side("ours_nf4", model=inputs.float16, data=inputs.wikisql, rows=ROWS, settings=settings))
        print(f"  {label(found[-1])}: perplexity {found[-1]['perplexity_after']:.2f}", flush=True)
    return {"rows": ROWS, "modes": found}


def label(found: dict[str, Any]) -> str:
    """A mode as a reader writes it."""
    return f"{found['mode']}, blocks of {found['group_size']}{', double' if found.get('double_quant') else ''}"


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    rows = [
        [label(found), found["bits_per_weight"], found["relative_error"], found["perplexity_after"], found["kl"],
         found["top1_agreement"]]
        for found in figures["modes"]
    ]  # fmt: skip
    before = figures["modes"][0]["perplexity_before"]
    title = (
        f"SmolLM2-135M in four bits, {figures['rows']} WikiSQL rows, loss on every token; perplexity {before:.1f} in "
        "half precision. It was published in affine blocks of 32, which favours those."
    )
    return [(title, ["mode", "bits a weight", "error", "perplexity", "KL (nats)", "same top token"], rows)]
