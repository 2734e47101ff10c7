"""Every key that a recipe may set: what it takes and means, and which key a familiar name stands for.

All of it is read off `config.py`; only the names that other tools use for the same settings are written down here.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mlx_lora.config import Adapter, Data, Quantize, Recipe, Section, Train
from mlx_lora.errors import RecipeError

SECTIONS: dict[str, type[Section]] = {"quantize": Quantize, "adapter": Adapter, "data": Data, "train": Train}
# What other tools call a setting, where it is the very same and takes the same values.
FAMILIAR = {
    "lr": "train.learning_rate",
    "num_train_epochs": "train.epochs", "num_epochs": "train.epochs", "n_epochs": "train.epochs",
    "max_steps": "train.iters",
    "gradient_accumulation_steps": "train.grad_accumulation", "grad_accumulation_steps": "train.grad_accumulation",
    "lr_scheduler_type": "train.schedule", "lr_schedule": "train.schedule",
    "warmup_ratio": "train.warmup",
    "optim": "train.optimizer",
    "eval_steps": "train.eval_every", "steps_per_eval": "train.eval_every",
    "save_steps": "train.save_every",
    "early_stopping_patience": "train.patience",
    "gradient_checkpointing": "train.grad_checkpoint",
    "r": "adapter.rank", "lora_r": "adapter.rank", "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "target_modules": "adapter.targets",
    "use_rslora": "adapter.rslora",
    "fine_tune_type": "adapter.method",
    "num_layers": "adapter.layers",
    "max_length": "data.max_seq_length", "max_seq_len": "data.max_seq_length", "cutoff_len": "data.max_seq_length",
    "q_bits": "quantize.bits", "q_group_size": "quantize.group_size",
}  # fmt: skip
# Names that may mean more than one setting.
UNCERTAIN = {
    "steps": ("train.iters", "train.eval_every", "train.save_every"),
    "every": ("train.eval_every", "train.save_every"),
    "checkpoint": ("train.grad_checkpoint", "train.save_every"),
    "scale": ("adapter.alpha", "adapter.rslora"),
    "layer": ("adapter.layers", "adapter.targets"),
    "length": ("data.max_seq_length", "data.too_long"),
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """One key: its default, the values it takes in words, and its meaning in one line."""

    key: str
    default: Any
    allowed: str
    meaning: str


def settings() -> list[Setting]:
    """Every key, in the order of a recipe."""
    listed = []
    for key, field in fields().items():
        default = field.get_default()
        default = default.model_dump() if isinstance(default, BaseModel) else default
        allowed = " | ".join(map(str, field.examples)) if field.examples else _allowed(field.annotation, field.metadata)
        listed.append(Setting(key, default, allowed, field.description or ""))
    return listed


def fields() -> dict[str, FieldInfo]:
    """The fields of a recipe that hold values, by dotted key."""
    named = {key: field for key, field in Recipe.model_fields.items() if key not in SECTIONS}
    for section, model in SECTIONS.items():
        named |= {f"{section}.{key}": field for key, field in model.model_fields.items()}
    return named


def dotted_keys() -> list[str]:
    """Every key a recipe may set, dotted, and the sections themselves."""
    return [*SECTIONS, *fields()]


def candidates(word: str) -> Sequence[str]:
    """The keys that a name without a section may mean: the same word as a key's last part, or a familiar name."""
    word = word.replace("-", "_")
    same = [key for key in fields() if key.rpartition(".")[2] == word]
    return same or ([FAMILIAR[word]] if word in FAMILIAR else UNCERTAIN.get(word, ()))


def full_key(word: str) -> str | None:
    """The key that a name stands for, None where nothing is known. Raises RecipeError where it isn't certain."""
    found = candidates(word)
    if len(found) > 1:
        raise RecipeError(f"{word!r} isn't a setting's name here", hint=f"it may mean {' or '.join(found)}")
    return found[0] if found else None


def translated(override: str) -> str:
    """A `key=value` word with its full key; what was made of a short or familiar name is logged."""
    key, equals, value = override.partition("=")
    if not equals or "." in key or key in dotted_keys() or (full := full_key(key)) is None:
        return override
    log.info("%s", f"{override}: {full}={value}")
    return f"{full}={value}"


def matching(word: str) -> list[Setting]:
    """The settings that a word is about: by a key or a familiar name it is part of, else by their meaning."""
    asked = word.lower().replace("-", "_")
    meant = set(candidates(asked))
    by_key = [setting for setting in settings() if asked in setting.key or setting.key in meant]
    return by_key or [setting for setting in settings() if word.lower() in setting.meaning.lower()]


def _allowed(annotation: Any, constraints: Iterable[Any] = ()) -> str:
    """The values of a type, in words: `integer ≥ 1 | null`."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _allowed(inner[0], [*inner[1:], *constraints])
    if origin in (Union, types.UnionType):
        return " | ".join(_allowed(each, constraints) for each in inner)
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin is list:
        return f"list of {_allowed(inner[0])}"
    if origin is dict:
        return f"name: {_allowed(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"mapping of {', '.join(annotation.model_fields)}"
    names = {int: "integer", float: "number", str: "text", bool: "true | false", type(None): "null"}
    return names[annotation] + (_bounds(constraints) if annotation in (int, float) else "")


def _bounds(constraints: Iterable[Any]) -> str:
    signs: dict[type, tuple[str, str]] = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}
    found = []
    for constraint in constraints:
        for each in constraint.metadata if isinstance(constraint, FieldInfo) else [constraint]:
            if type(each) in signs:
                sign, attribute = signs[type(each)]
                bound = getattr(each, attribute)
                found.append(f" {sign} {'2^64' if bound == 2**64 else bound}")
    return ",".join(found)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
