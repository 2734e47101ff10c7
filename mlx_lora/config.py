"""The recipe: the one place where every setting, its default and its validation lives.

A type here says what is built: a value that the contract names but no code serves yet is not in the type, so asking
for it is an error and never ignored. Nothing here imports MLX.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mlx_lora import files, paths
from mlx_lora.errors import RecipeError, nearest
from mlx_lora.methods import INITIALISATIONS, METHODS, MODES

ENDINGS = (".yaml", ".yml")
LARGEST = 1 << 20  # bytes of a recipe


def _known(value: str, known: Iterable[str]) -> str:
    if value not in known:
        raise ValueError(f"{value!r} is not known here{nearest(str(value), known)}")
    return value


def _switch(value: Any) -> Any:
    """YAML reads bare on and off as booleans; take them back to words."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


def _number(value: Any) -> Any:
    """Refuse yes and no where a number is meant: pydantic would read them as 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "input should be a number")
    return value


Integer = Annotated[int, BeforeValidator(_number)]
Number = Annotated[float, BeforeValidator(_number)]


class Section(BaseModel):
    """A part of the recipe. Unknown keys are errors; sections are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Quantize(Section):
    """How to quantize the base before training. The adapter then belongs to the quantized base."""

    mode: str = "affine"
    bits: Integer | None = None
    group_size: Integer | None = None
    double_quant: Literal[False] = False

    @field_validator("mode")
    @classmethod
    def _mode(cls, value: str) -> str:
        return _known(value, MODES)

    @model_validator(mode="after")
    def _check(self) -> Quantize:
        bits, groups = MODES[self.mode]
        faults = [
            f"{key} {value} for mode {self.mode}, which takes {', '.join(map(str, sorted(known)))}"
            for key, value, known in (("bits", self.bits, bits), ("group_size", self.group_size, groups))
            if value is not None and value not in known
        ]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def complete(self) -> dict[str, Any]:
        """`{mode, bits, group_size}` with the mode's own defaults filled in."""
        bits, groups = MODES[self.mode]
        return {"mode": self.mode, "bits": self.bits or bits[0], "group_size": self.group_size or groups[0]}


class Adapter(Section):
    """What is attached: method, rank, scale and place. The update is (alpha / rank) · B A."""

    method: str = "lora"
    rank: Integer = Field(default=8, ge=1)
    alpha: Number = Field(default=16, gt=0)
    dropout: Number = Field(default=0.0, ge=0, lt=1)
    targets: str | list[str] = "attention"
    layers: Literal["all"] | Annotated[Integer, Field(ge=1)] | list[Integer] = "all"
    init: str = "default"
    rslora: bool = False
    rank_pattern: dict[str, Annotated[Integer, Field(ge=1)]] = {}
    alpha_pattern: dict[str, Annotated[Number, Field(gt=0)]] = {}

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
            _expression(value[1:-1])
        return value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns(cls, value: dict[str, Any]) -> dict[str, Any]:
        for pattern in value:
            _expression(pattern)
        return value

    def rank_of(self, path: str) -> int:
        """The rank of the module at `path`, after `rank_pattern`."""
        return _pattern(self.rank_pattern, path, self.rank)

    def scale_of(self, path: str) -> float:
        """s in y = W₀x + s·BAx: α/r, or α/√r with rsLoRA (arXiv 2312.03732)."""
        rank = self.rank_of(path)
        alpha = _pattern(self.alpha_pattern, path, self.alpha)
        return float(alpha / (rank**0.5 if self.rslora else rank))


def _expression(text: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is not a regular expression: {error}") from None


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
    max_seq_length: Integer = Field(default=2048, ge=2)
    too_long: Literal["error", "drop", "truncate-start", "truncate-end", "split"] = "error"
    valid_fraction: Number = Field(default=0.1, ge=0, lt=1)
    packing: bool = False


class Train(Section):
    """The loop. One optimizer step is batch_size × grad_accumulation rows, over all processes together.

    grad_checkpoint `auto` recomputes layers where a step's activations would not fit the free memory; cache_prefix
    `auto` keeps what enters the first adapted layer where that is a later one, there is room, and rows come again.
    memory_limit_gb, in units of 10⁹ bytes, is the most that training may take, less than the machine has.
    """

    epochs: Integer = Field(default=1, ge=1)
    iters: Integer | None = Field(default=None, ge=1)
    batch_size: Integer = Field(default=4, ge=1)
    grad_accumulation: Integer = Field(default=1, ge=1)
    learning_rate: Number = Field(default=2e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Number = Field(default=0.03, ge=0, lt=1)
    optimizer: Literal["adam", "adamw", "sgd", "lion", "adafactor", "muon"] = "adamw"
    weight_decay: Number = Field(default=0.0, ge=0)
    max_grad_norm: Number | None = Field(default=1.0, gt=0)
    loraplus_ratio: None = None
    eval_every: Integer | None = Field(default=None, ge=1)
    save_every: Integer | None = Field(default=None, ge=1)
    patience: Integer | None = Field(default=None, ge=1)
    grad_checkpoint: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = "auto"
    cache_prefix: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = "auto"
    memory_limit_gb: Number | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Train:
        faults = []
        if self.patience is not None and self.eval_every is None:
            faults.append("patience counts evaluations, and eval_every is not set")
        if self.weight_decay and self.optimizer == "adam":
            faults.append("weight_decay is not part of adam; adamw has it")
        if faults:
            raise ValueError("; ".join(faults))
        return self


class Recipe(Section):
    """Everything that decides a training run."""

    model: str | None = None
    name: str | None = None
    quantize: Quantize | None = None
    adapter: Adapter = Adapter()
    data: Data = Data()
    train: Train = Train()
    seed: Integer = Field(default=0, ge=0, lt=2**64)

    @field_validator("adapter", "data", "train", mode="before")
    @classmethod
    def _section(cls, value: Any) -> Any:
        return {} if value is None else value  # a heading whose keys are all commented out


SECTIONS: dict[str, type[Section]] = {"quantize": Quantize, "adapter": Adapter, "data": Data, "train": Train}


class _Loader(yaml.SafeLoader):
    """Plain values only. A key given twice is an error; YAML would keep the last one in silence.

    So is an alias: ten lines of them stand for more values than memory holds.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases have no use here", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is a word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        """Any base, but no more digits than a setting has: Python refuses to write longer ones out."""
        if abs(value := int(super().construct_yaml_int(node))) >= 2**64:
            raise yaml.constructor.ConstructorError(None, None, "a number with too many digits", node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def load_recipe(
    file: Path | None = None,
    overrides: Iterable[str] = (),
    *,
    settings: dict[str, Any] | None = None,
    where: str = "recipe",
) -> Recipe:
    """Read a recipe file, then `settings` (dotted keys), then `key=value` overrides, each winning over the former.

    A file that isn't there is looked up among the recipes that come with the package. The run's name defaults to the
    file's. Raises RecipeError naming every fault at once, with the nearest key where one is close.
    """
    values: dict[str, Any] = {}
    if file is not None:
        file = _find_recipe(file)
        values = _read_yaml(file)
        values["name"] = file.stem if values.get("name") is None else values["name"]
    for key, value in (settings or {}).items():
        _set(values, key, value)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"{override!r} is not key=value", hint="for example: adapter.rank=16")
        _set(values, key, _parse_yaml(text, f"override {override!r}"))
    return parse_recipe(values, str(file) if file else where)


def parse_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a mapping. Raises RecipeError listing all faults."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{where}: " + "\n  ".join(_faults(error))) from None


def dotted_keys() -> list[str]:
    """Every key a recipe may set, dotted."""
    return [*Recipe.model_fields, *(f"{name}.{key}" for name, part in SECTIONS.items() for key in part.model_fields)]


def _faults(error: ValidationError) -> list[str]:
    """One line for each faulty key, however many forms of its value were tried."""
    lines: dict[str, list[str]] = {}
    for fault in error.errors():
        key = str(fault["input"]) if fault["type"] == "invalid_key" else _key(fault["loc"])
        if fault["type"] in ("extra_forbidden", "invalid_key"):
            lines[f"unknown key {key!r}{_nearest_key(key)}"] = []
            continue
        given = "" if fault["type"] == "value_error" else f" {str(fault['input'])[:40]!r} is refused:"
        wanted = lines.setdefault(f"{key}:{given} ", [])
        wanted += [reason for reason in [_reason(fault)] if reason not in wanted]
    return [line + ", or ".join(wanted) for line, wanted in lines.items()]


def _key(location: tuple[int | str, ...]) -> str:
    """The dotted key of a fault, without the forms of its value that pydantic adds."""
    parts = [str(part) for part in location]
    if parts[0] not in SECTIONS:
        return parts[0]
    return ".".join(parts[: 3 if parts[1:2] in (["rank_pattern"], ["alpha_pattern"]) else 2])


def _reason(fault: Any) -> str:
    if fault["type"] == "none_required":
        return "only null is known here"
    if fault["type"] == "literal_error":
        known = re.findall(r"'([^']*)'", fault["ctx"]["expected"])
        word = str(fault["input"])
        return f"not known here{nearest(word, known)}" if known else "only false is known here"
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "model_type":
        message = "a section is a mapping of keys to values"
    return message[0].lower() + message[1:]


def _nearest_key(key: str) -> str:
    """What `key` was meant to be: the same word in another place, else a similar one in its own."""
    section, _, word = key.rpartition(".")
    words = {known.rpartition(".")[2]: known for known in dotted_keys()}
    if word in words:
        return f"; did you mean {words[word]!r}?"
    here = {known.rpartition(".")[2]: known for known in dotted_keys() if known.rpartition(".")[0] == section}
    if close := difflib.get_close_matches(word, here, n=1, cutoff=0.5):
        return f"; did you mean {here[close[0]]!r}?"
    if close := difflib.get_close_matches(word, words, n=1, cutoff=0.5):
        return f"; did you mean {words[close[0]]!r}?"
    return f"; known: {', '.join(sorted(here or Recipe.model_fields))}"


def _find_recipe(file: Path) -> Path:
    with_ending = file if file.suffix else file.with_suffix(".yaml")
    for candidate in (file, Path("recipes", with_ending.name)):
        if (found := paths.existing(candidate)) and found.is_file():
            return found
    names = [path.name for path in paths.bundled("recipes").glob("*.yaml")]
    raise RecipeError(f"{file}: no such recipe{nearest(with_ending.name, names)}")


def _read_yaml(file: Path) -> dict[str, Any]:
    if file.suffix not in ENDINGS:
        raise RecipeError(f"{file}: not a {' or '.join(ENDINGS)} file")
    values = _parse_yaml(files.read_text(file, RecipeError, most=LARGEST), str(file))
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise RecipeError(f"{file}: a recipe is a mapping of keys to values", hint="see the examples in recipes/")
    return values


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # YAMLError apart: dates that don't exist, tags on values they don't fit, nesting without end
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
