"""The table of architectures in mlx_lora/models/README.md, from a tiny model of each: `python -m tests.models.table`.

Every entry is what the verifier finds, as it does at the start of a training run; none is written by hand.
"""

from __future__ import annotations

from pathlib import Path

import mlx.nn as nn

from mlx_lora.errors import ModelError
from mlx_lora.models.architectures import OWN_LOOPS
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.models.trunk.lean import RUNNING, parts_of
from mlx_lora.models.trunk.packing import packing_refused
from mlx_lora.models.trunk.trunk import Trunk
from mlx_lora.models.trunk.verify import take_apart, verify, verify_start
from tests.bench import results
from tests.models.test_every_architecture import CONFIGS, UNCOVERED, adapted

PAGE = Path(__file__).parents[2] / "mlx_lora" / "models" / "README.md"
BEGIN, END = "<!-- the table, by python -m tests.models.table -->", "<!-- end of the table -->"
HEADER = ("mlx_lm's module", "trains", "computed again", "last layer cut", "kept prefix", "packs", "recurrence", "plan")


def row(name: str) -> tuple[str, ...]:
    """What holds for one architecture."""
    model = adapted(name, layers="all")
    trunk = take_apart(model)
    try:
        found = verify(trunk, recompute=True, columns=True)
    except ModelError:
        return (name, "no: mlx_lm has no gradient", "", "", "", "", recurrence(model), "")
    packs = packing_refused(trunk, without=found.without) is None
    start = not isinstance(verify_start(trunk, len(layers_of(model)) - 1), str)
    trains = "yes" if not found.without else f"yes; {', '.join(sorted(found.without))} as mlx_lm has them"
    marks = (mark(found.recompute), mark(found.columns), mark(start), mark(packs))
    return (name, trains + heads(trunk), *marks, recurrence(model), measured(name))


def mark(holds: bool) -> str:
    return "yes" if holds else "no"


def heads(trunk: Trunk) -> str:
    return "" if trunk.apart else "; logits at every position"


def recurrence(model: nn.Module) -> str:
    """Which form a state or a short convolution is trained in: ours, in chunks, or a loop of mlx-lm's own."""
    modules = [module for layer in layers_of(model) for module in layer.modules()]
    if any(type(module).__name__ in OWN_LOOPS for module in modules):
        return "mlx_lm's loop, slow"
    kinds = {part for module in modules for part in parts_of(module)} & RUNNING
    return "chunked" if "recurrence" in kinds else "convolution" if kinds else ""


def measured(name: str) -> str:
    """Whether `tests.bench plan` holds predictions against measured peaks of this architecture."""
    figures = results.read()["plan"]["figures"]
    kinds = {str(config.get("model_type")) for config in figures["configs"].values()}
    return "measured" if name in kinds or name == "llama" else ""


def table() -> str:
    """Markdown, with the modules that have no row and why."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    lines += ["| " + " | ".join(row(name)) + " |" for name in sorted(CONFIGS)]
    lines += ["", "Not covered:", ""] + [f"- `{name}`: {reason}" for name, reason in sorted(UNCOVERED.items())]
    return "\n".join(lines)


def written(page: str, made: str) -> str:
    """The page with the table between its marks."""
    return page[: page.index(BEGIN) + len(BEGIN)] + "\n\n" + made + "\n\n" + page[page.index(END) :]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(), table()))
