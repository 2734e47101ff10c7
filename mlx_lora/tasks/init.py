"""A first recipe for a model and some data: what suits them is read from both, and each choice says why.

Nothing is guessed that can be looked up: the number of weights, how long the rows are, whether the base has a chat
template, what training will take. Rates, epochs and evaluations are those of `auto` (`train.automatic`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mlx_lora import paths, ui
from mlx_lora.config import Recipe
from mlx_lora.data.prepare import OnFile, Prepared, prepare, silent
from mlx_lora.data.rows import lengths
from mlx_lora.errors import NameTaken
from mlx_lora.models.context import context_length
from mlx_lora.models.open import OpenModel, open_model
from mlx_lora.models.shapes import network, summary
from mlx_lora.quant.quantize import parameter_count
from mlx_lora.recipe import load_recipe, parse_recipe
from mlx_lora.tasks.automatic import resolved
from mlx_lora.tasks.plan import lengths_of, plan_recipe
from mlx_lora.train.budget.choose import Plan

# Bases with more weights than this are quantized to 4 bits, unless they are packed already.
LARGE = 1e9
SHORTEST, LONGEST = 256, 4096
SECTIONS = ("adapter", "data", "train")


@dataclass(frozen=True)
class Choice:
    """A setting of the recipe, with the reason that its comment gives."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Draft:
    """A recipe to be: its choices, the rows it was made for, and what training will take."""

    name: str
    model: str
    data: str
    choices: list[Choice]
    plan: Plan
    rows: int

    def text(self) -> str:
        """The recipe file."""
        memory = ui.size(self.plan.peak_memory_bytes)
        head = [
            f"# {self.name}: made by `mlx-lora init` for {self.rows} rows of {self.data}.",
            "#",
            f"# Needs:    the model {self.model}, the data {self.data}; about {memory} of memory",
            f"# Run:      mlx-lora train {self.name}.yaml",
            f"# Look:     mlx-lora verdict --adapter {self.name} --data {self.data}",
            f"# Change:   mlx-lora train {self.name}.yaml adapter.rank=16 --name {self.name}-wide",
            _line("model", self.model),
        ]
        sections: dict[str, list[str]] = {
            "quantize": [],
            "adapter": [],
            "data": [_line("  path", self.data)],
            "train": [],
        }
        for choice in self.choices:
            section, _, key = choice.key.rpartition(".")
            if section:
                sections[section].append(f"{_line(f'  {key}', choice.value)}  # {choice.reason}")
            else:
                sections[key] = [f"{_line(key, choice.value)}  # {choice.reason}"]
        for section, lines in sections.items():
            head += [f"{section}:", *lines] if lines and lines[0].startswith("  ") else lines
        return "\n".join(head) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """The keys of `init --json`, beside the file's `out`."""
        return {
            "name": self.name,
            "command": f"mlx-lora train {self.name}.yaml",
            "rows": self.rows,
            "settings": {choice.key: choice.value for choice in self.choices},
            "plan": self.plan.as_dict(),
        }


def draft(
    model: str,
    data: str,
    name: str,
    *,
    system: str | None = None,
    overrides: list[str] | None = None,
    progress: OnFile = silent,
) -> Draft:
    """Look at model and data, and choose what `overrides` leave open.

    Raises what training would raise for a model or rows that can't be used.
    """
    opened = open_model(model)
    given = load_recipe(None, overrides or [], settings={"model": model, "data.path": data, "name": name})
    asked = _asked(given)
    choices = _of_model(opened)
    if system:
        choices.append(Choice("data.system", system, "in front of every row, and of every chat"))
    if not opened.tokenizer.has_chat_template:
        choices.append(Choice("data.template", "chatml", "the base has no chat template of its own"))
    settings = _with(given, choices).data.model_copy(
        update={"max_seq_length": context_length(opened.config) or LONGEST}
    )
    prepared = prepare(data, settings, opened.tokenizer, progress=progress)
    choices += _of_rows(prepared)
    choices += _automatic(_with(given, choices), opened, prepared)
    rows = lengths_of(prepared.train, prepared.valid)
    plan = plan_recipe(_with(given, choices), rows=rows)
    if not plan.fits and plan.suggestion:
        changed = dict(word.split("=", 1) for word in plan.suggestion)
        choices = [choice for choice in choices if choice.key not in changed]
        reason = "to fit this machine's memory"
        choices += [Choice(key, yaml.safe_load(value), reason) for key, value in changed.items()]
        plan = plan_recipe(_with(given, choices))  # rows may be cut now
    final = [choice for choice in choices if choice.key not in asked]
    final += [Choice(key, value, "as you asked") for key, value in asked.items()]
    return Draft(name, model, data, final, plan, len(prepared.train) + len(prepared.valid))


def write(made: Draft, out: Path, *, force: bool = False) -> None:
    """Write the recipe file. Raises NameTaken where it exists."""
    if out.exists() and not force:
        raise NameTaken(f"{out} exists", hint="--out another file, or --force to replace it")
    parse_recipe(yaml.safe_load(made.text()), str(out))  # a fault would be one of this program
    with paths.created(out, "wb") as stream:
        stream.write(made.text().encode())


def _of_model(opened: OpenModel) -> list[Choice]:
    """What the size of the base decides."""
    config = summary(opened)
    count = parameter_count(network(config, gpu=True))
    choices = []
    if count > LARGE and not config.get("quantization"):
        choices.append(Choice("quantize", {"mode": "affine", "bits": 4}, f"{count / 1e9:.1f} billion weights"))
    choices += [
        Choice("adapter.rank", 8, "enough for a format or a style; 16 and more where many facts are to be learned"),
        Choice("adapter.alpha", 16, "twice the rank"),
        Choice("adapter.targets", "attention", "all-linear learns more, in more time and memory"),
    ]
    return choices


def _of_rows(prepared: Prepared) -> list[Choice]:
    """What the length of the rows decides."""
    longest = int(max(lengths(prepared.train).max(), lengths(prepared.valid).max(initial=0)))
    padded = 1 << (longest - 1).bit_length()
    return [Choice("data.max_seq_length", max(padded, SHORTEST), f"the longest row has {longest} tokens")]


def _automatic(recipe: Recipe, opened: OpenModel, prepared: Prepared) -> list[Choice]:
    """What `auto` stands for with these rows over this base, as numbers that may be edited."""
    _, made = resolved(recipe, opened, rows=len(prepared.train), valid=len(prepared.valid))
    values = made.settings.model_dump()
    return [Choice(key, values[key.removeprefix("train.")], reason) for key, reason in made.reasons.items()]


def _with(given: Recipe, choices: list[Choice]) -> Recipe:
    """The recipe with the choices, under what was asked for."""
    paths_and_names = {"model": given.model, "data.path": given.data.path, "name": given.name}
    return load_recipe(
        None, settings={**{choice.key: choice.value for choice in choices}, **paths_and_names, **_asked(given)}
    )


def _asked(given: Recipe) -> dict[str, Any]:
    """What the overrides have set, by dotted key."""
    asked: dict[str, Any] = {}
    for key, value in given.model_dump(exclude_unset=True).items():
        if key in SECTIONS:
            asked |= {f"{key}.{inner}": setting for inner, setting in value.items() if (key, inner) != ("data", "path")}
        elif key not in ("model", "name"):
            asked[key] = value
    return asked


def _line(key: str, value: Any) -> str:
    """`key: value` as YAML."""
    return f"{key}: {yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10000).strip()[1:-1]}"
