"""The recipe: the one place where every setting, its default and its validation lives.

A type here says what is built: a value that the contract names but no code serves yet is not in the type, so asking
for it is an error and never ignored. Nothing here imports MLX.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from mlx_lora import paths
from mlx_lora.errors import RecipeError, nearest
from mlx_lora.methods import INITIALISATIONS, METHODS, MODES


def _known(value: str, known: Iterable[str]) -> str:
    if value not in known:
        raise ValueError(f"{value!r} is not known here{nearest(str(value), known)}")
    return value


def _switch(value: Any) -> Any:
    """YAML reads bare on and off as booleans; take them back to words."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


class Section(BaseModel):
    """A part of the recipe. Unknown keys are errors; sections are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Quantize(Section):
    """How to quantize the base before training. The adapter then belongs to the quantized base."""

    mode: str = "affine"
    bits: int | None = None
    group_size: int | None = None
    double_quant: Literal[False] = False

    @model_validator(mode="after")
    def _check(self) -> Quantize:
        _known(self.mode, MODES)
        bits, groups = MODES[self.mode]
        if self.bits is not None and self.bits not in bits:
            raise ValueError(f"bits {self.bits} for mode {self.mode}; it takes {', '.join(map(str, sorted(bits)))}")
        if self.group_size is not None and self.group_size not in groups:
            raise ValueError(
                f"group_size {self.group_size} for mode {self.mode}; it takes {', '.join(map(str, sorted(groups)))}"
            )
        return self

    def complete(self) -> dict[str, Any]:
        """`{mode, bits, group_size}` with the mode's own defaults filled in."""
        bits, groups = MODES[self.mode]
        return {"mode": self.mode, "bits": self.bits or bits[0], "group_size": self.group_size or groups[0]}


class Adapter(Section):
    """What is attached: method, rank, scale and place. The update is (alpha / rank) · B A."""

    method: str = "lora"
    rank: int = Field(8, ge=1)
    alpha: float = Field(16, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str | list[str] = "attention"
    layers: Literal["all"] | Annotated[int, Field(ge=1)] | list[int] = "all"
    init: str = "default"
    rslora: bool = False
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = {}
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}

    @field_validator("method")
    @classmethod
    def _method(cls, value: str) -> str:
        return _known(value, METHODS)

    @field_validator("init")
    @classmethod
    def _init(cls, value: str) -> str:
        return _known(value, INITIALISATIONS)

    @field_validator("targets")
    @classmethod
    def _targets(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, list) and not value:
            raise ValueError("an empty list attaches nothing; name modules, or use attention or all-linear")
        if isinstance(value, str) and len(value) > 1 and value[0] == value[-1] == "/":
            try:
                re.compile(value[1:-1])
            except re.error as error:
                raise ValueError(f"{value} is not a regular expression: {error}") from None
        return value

    def rank_of(self, path: str) -> int:
        """The rank of the module at `path`, after `rank_pattern`."""
        return _pattern(self.rank_pattern, path, self.rank)

    def scale_of(self, path: str) -> float:
        """s in y = W₀x + s·BAx: α/r, or α/√r with rsLoRA (arXiv 2312.03732)."""
        rank = self.rank_of(path)
        alpha = _pattern(self.alpha_pattern, path, self.alpha)
        return float(alpha / (rank**0.5 if self.rslora else rank))


def _pattern(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """First pattern that matches the end of a module path wins, as in PEFT."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


class Data(Section):
    """Where rows come from and how they become tokens and loss weights."""

    path: str | None = None
    format: Literal["auto", "text", "completions", "messages", "alpaca", "sharegpt"] = "auto"
    template: Literal["auto", "chat", "none"] = "auto"
    mask: Literal["auto", "all", "completion", "assistant", "last"] = "auto"
    max_seq_length: int = Field(2048, ge=2)
    too_long: Literal["error", "drop", "truncate-start", "truncate-end", "split"] = "error"
    valid_fraction: float = Field(0.1, ge=0, lt=1)
    packing: Literal[False] = False


class Train(Section):
    """The loop. One optimizer step is batch_size × grad_accumulation rows."""

    epochs: int = Field(1, ge=1)
    iters: int | None = Field(None, ge=1)
    batch_size: int = Field(4, ge=1)
    grad_accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(2e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: float = Field(0.03, ge=0, lt=1)
    optimizer: Literal["adam", "adamw", "sgd", "lion", "adafactor", "muon"] = "adamw"
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float | None = Field(1.0, gt=0)
    loraplus_ratio: None = None
    eval_every: int | None = Field(None, ge=1)
    save_every: int | None = Field(None, ge=1)
    patience: int | None = Field(None, ge=1)
    grad_checkpoint: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = "auto"
    cache_prefix: Annotated[Literal["auto", "off"], BeforeValidator(_switch)] = "auto"
    memory_limit_gb: None = None


class Recipe(Section):
    """Everything that decides a training run."""

    model: str | None = None
    name: str | None = None
    quantize: Quantize | None = None
    adapter: Adapter = Adapter()
    data: Data = Data()
    train: Train = Train()
    seed: int = Field(0, ge=0)


def load_recipe(
    file: Path | None = None, overrides: Iterable[str] = (), *, settings: dict[str, Any] | None = None
) -> Recipe:
    """Read a recipe file, then `settings` (dotted keys), then `key=value` overrides, each winning over the former.

    A file that isn't there is looked up among the recipes that come with the package. The run's name defaults to the
    file's. Raises RecipeError naming every fault at once, with the nearest key where one is close.
    """
    values: dict[str, Any] = {}
    if file is not None:
        file = _find_recipe(file)
        values = _read_yaml(file)
        values.setdefault("name", file.stem)
    for key, value in (settings or {}).items():
        _set(values, key, value)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"{override!r} is not key=value", hint="for example: adapter.rank=16")
        _set(values, key, _parse_yaml(text, f"override {override!r}"))
    return parse_recipe(values, str(file) if file else "recipe")


def parse_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a mapping. Raises RecipeError listing all faults."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        faults = [_fault(fault) for fault in error.errors()]
        raise RecipeError(f"{where}: " + "\n  ".join(dict.fromkeys(faults))) from None


def dotted_keys() -> list[str]:
    """Every key a recipe may set, dotted."""
    sections: dict[str, type[BaseModel]] = {"quantize": Quantize, "adapter": Adapter, "data": Data, "train": Train}
    inner = [f"{name}.{key}" for name, section in sections.items() for key in section.model_fields]
    return [*Recipe.model_fields, *inner]


def _fault(fault: Any) -> str:
    location = ".".join(str(part) for part in fault["loc"] if isinstance(part, str) and part not in ("int", "list"))
    location = re.sub(r"\.(str|literal\[.*|constrained-int|list\[.*)$", "", location)
    if fault["type"] == "extra_forbidden":
        suggestion = nearest(location, dotted_keys())
        if "did you mean" not in suggestion:
            section = location.rpartition(".")[0]
            suggestion = nearest("", [key for key in dotted_keys() if key.rpartition(".")[0] == section])
        return f"unknown key {location!r}{suggestion}"
    message = fault["msg"].removeprefix("Value error, ")
    given = "" if fault["type"] == "value_error" else f" {str(fault['input'])[:40]!r} is refused:"
    return f"{location}:{given} {message[0].lower() + message[1:]}"


def _find_recipe(file: Path) -> Path:
    with_ending = file if file.suffix else file.with_suffix(".yaml")
    for candidate in (file, Path("recipes", with_ending.name)):
        if (found := paths.existing(candidate)) and found.is_file():
            return found
    names = [path.name for path in paths.bundled("recipes").glob("*.yaml")]
    raise RecipeError(f"{file}: no such recipe{nearest(with_ending.name, names)}")


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: can't be read ({error})") from None
    values = _parse_yaml(text, str(file))
    if not isinstance(values, dict):
        raise RecipeError(f"{file}: a recipe is a mapping of keys to values", hint="see the examples in recipes/")
    return values


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{where}{line}: not valid YAML ({getattr(error, 'problem', None) or error})") from None


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        if not isinstance(inner, dict):
            inner = values[section] = {}
        values = inner
    values[last] = value
