"""One answer at a time: with drafts out of its prompt and without, its first token, and keys and values in fewer bits.

Answers with and without drafts are the same, or part where two tokens are as likely as each other; both sides are asked
in turn, in one process. Beside: exact answers of three adapters in the same batches, and adapter by adapter.
"""

from __future__ import annotations

from typing import Any

from tests.bench.inputs import Inputs
from tests.bench.process import alternate, side

TASKS = ("notes", "mail", "sql")
TOKENS = 512


def measure(inputs: Inputs, quick: bool) -> dict[str, Any]:
    base, rows = inputs.quickstart, 8 if quick else 40
    found: dict[str, Any] = {"drafts": {}}
    for name in TASKS:
        found["drafts"][name] = side("lookup.tasks", base=base, task=name, adapter=f"quickstart-{name}", rows=rows)
        print(f" {name}: {found['drafts'][name]}", flush=True)
    model = inputs.float32
    found["drafts"]["rewriting"] = side("lookup.rewriting", model=model, paragraphs=1 if quick else 3)
    print(f" rewriting: {found['drafts']['rewriting']}", flush=True)
    common = {"model": model, "tokens": TOKENS, "times": 2 if quick else 4}
    first = alternate(
        {"mlx_lm": ("lookup.first_theirs", common), "ours": ("lookup.first_ours", common)}, runs=1 if quick else 2
    )
    found["first"] = first | {"ratio": first["mlx_lm"]["seconds"] / first["ours"]["seconds"]}
    found["bits"] = side("lookup.bits", model=model, tokens=TOKENS, most=8 if quick else 24)
    adapters = [f"quickstart-{name}" for name in TASKS]
    found["together"] = side("lookup.together", base=base, adapters=adapters, rows=rows, times=1 if quick else 3)
    return found


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    drafts = [
        [name, run["without"], run["with"], run["ratio"], f"{run['held']} of {run['drafted']}", run["parted_at_ties"]]
        for name, run in figures["drafts"].items()
    ]
    first, bits, together = figures["first"], figures["bits"], figures["together"]
    plain = bits["None"]
    return [
        (
            "Tokens a second of one answer at a time, greedy: three tasks of the embedded base with the adapters that "
            "`quickstart` trains, and SmolLM2-135M in float32 copying paragraphs with a change.",
            ["", "without drafts", "with drafts", "times faster", "drafts that held", "parted at ties"],
            drafts,
        ),
        (
            f"First token of a prompt of {TOKENS} tokens, SmolLM2-135M in float32.",
            ["", "seconds", "times mlx_lm"],
            [[label, first[label]["seconds"], first["mlx_lm"]["seconds"] / first[label]["seconds"]]
             for label in ("mlx_lm", "ours")],
        ),
        (
            f"Keys and values of a prompt of {TOKENS} tokens in fewer bits, SmolLM2-135M in float32.",
            ["bits", "MB", "of float32", "times its tokens a second"],
            [[{"None": "32"}.get(key, key), run["bytes"] / 1e6, run["bytes"] / plain["bytes"],
              run["tokens_per_second"] / plain["tokens_per_second"]] for key, run in bits.items()],
        ),
        (
            f"Exact answers to {together['answers']} rows of three adapters, {together['same']} of them the same.",
            ["", "seconds", "times faster"],
            [
                ["adapter by adapter", together["one by one"], 1.0],
                ["in the same batches", together["together"], together["ratio"]],
            ],
        ),
    ]  # fmt: skip
