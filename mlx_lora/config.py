"""The recipe: the one place where every setting, its default and its validation lives; `recipe.py` reads the files.

A type here says what is built: a value that the contract names but no code serves yet is not in the type, so asking
for it is an error and never ignored. Nothing here imports MLX.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mlx_lora.errors import nearest
from mlx_lora.methods import COMBINATIONS, INITIALISATIONS, LORA_ONLY, METHODS, MODES, SETTINGS, TARGETS


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
    double_quant: bool = False

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
        if self.double_quant and self.mode != "nf4":
            faults.append(f"double_quant for mode {self.mode}; only nf4 has it")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def complete(self) -> dict[str, Any]:
        """`{mode, bits, group_size}` with the mode's own defaults filled in, and for nf4 `double_quant`."""
        bits, groups = MODES[self.mode]
        settings = {"mode": self.mode, "bits": self.bits or bits[0], "group_size": self.group_size or groups[0]}
        return settings | ({"double_quant": self.double_quant} if self.mode == "nf4" else {})


class Glora(Section):
    """What trains in GLoRA (arXiv 2306.07967, eq. 6): W = W₀ + W₀⊙A + B, b = b₀ + b₀⊙D + E + W₀C."""

    a: Literal["lora", "vector", "scalar", "none"] = "lora"
    b: Literal["lora", "vector", "scalar", "none"] = "lora"
    c: Literal["lora", "vector", "none"] = "lora"
    d: Literal["vector", "scalar", "none"] = "vector"
    e: Literal["vector", "scalar", "none"] = "vector"

    @model_validator(mode="after")
    def _check(self) -> Glora:
        if {self.a, self.b, self.c, self.d, self.e} == {"none"}:
            raise ValueError("with a, b, c, d and e all none, nothing would train")
        return self


class Adapter(Section):
    """What is attached: method, rank, scale and place. The update of LoRA is (alpha / rank) · B A.

    `targets` left out is the method's own choice (`methods.TARGETS`). A setting that the method doesn't have is an
    error where it is given. prune_from and prune_until are fractions of the steps.
    """

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
    glora: Glora = Glora()
    projection_seed: Integer = Field(default=0, ge=0, lt=2**64)
    virtual_tokens: Integer = Field(default=16, ge=1)
    position: Literal["prefix", "infix"] = "prefix"
    bottleneck: Integer = Field(default=16, ge=1)
    target_rank: Integer | None = Field(default=None, ge=1)
    prune_from: Number = Field(default=0.1, ge=0, le=1)
    prune_until: Number = Field(default=0.5, ge=0, le=1)
    prune_every: Integer = Field(default=10, ge=1)
    orthogonal: Number = Field(default=0.5, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _place(cls, values: Any) -> Any:
        """The method's own targets where none are given; stored settings name `own` where the place is the method's."""
        if isinstance(values, dict) and values.get("targets") is None:
            method = str(values.get("method", "lora")).partition("+")[0]
            return values | {"targets": TARGETS.get(method, "attention") or "own"}
        return values

    @field_validator("method")
    @classmethod
    def _method(cls, value: str) -> str:
        return _known(value, [*METHODS, *COMBINATIONS])

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

    @model_validator(mode="after")
    def _belongs(self) -> Adapter:
        methods = set(self.method.split("+"))
        fields = type(self).model_fields
        given = [key for key in SETTINGS if getattr(self, key) != fields[key].default]  # a manifest holds them all
        faults = [
            f"{key} is a setting of {', '.join(SETTINGS[key])}; {self.method} has none"
            for key in given
            if not methods.intersection(SETTINGS[key])
        ]
        if methods <= {"prefix", "prompt"} and self.targets != "own":
            faults.append(f"{self.method} has a place of its own: leave targets out")
        if self.init in LORA_ONLY and "lora" not in methods:
            faults.append(f"init {self.init} is for lora")
        if self.target_rank is not None and self.target_rank > self.rank:
            faults.append(f"target_rank {self.target_rank} is above the rank it starts from, {self.rank}")
        if self.prune_from > self.prune_until:
            faults.append("prune_from is after prune_until")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def of(self, method: str) -> Adapter:
        """These settings as those of one method of a combination."""
        return self if method == self.method else self.model_copy(update={"method": method})

    def rank_of(self, path: str) -> int:
        """The rank of the module at `path`, after `rank_pattern`."""
        return _pattern(self.rank_pattern, path, self.rank)

    def has_own_rank(self, path: str) -> bool:
        """Whether `rank_pattern` names the module at `path`."""
        return _pattern(self.rank_pattern, path, None) is not None

    def with_ranks(self, ranks: dict[str, int]) -> Adapter:
        """These settings with other ranks for modules by path, and an alpha for each that leaves its scale."""
        alphas: dict[str, float] = {}
        if set(self.method.split("+")).intersection(SETTINGS["alpha_pattern"]):
            alphas = {path: self.scale_of(path) * (rank**0.5 if self.rslora else rank) for path, rank in ranks.items()}
        return self.model_copy(
            update={
                "rank_pattern": _first(ranks, self.rank_pattern),
                "alpha_pattern": _first(alphas, self.alpha_pattern),
            }
        )

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


def _first(values: dict[str, Any], patterns: dict[str, Any]) -> dict[str, Any]:
    """Patterns that give `values` by exact path, before the others."""
    exact = {re.escape(path): value for path, value in values.items()}
    return exact | {pattern: value for pattern, value in patterns.items() if pattern not in exact}


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
        memory_limit_gb, in GiB, is what training may take, more or less than the machine recommends. on_memory says what
    happens where it isn't enough: refuse, or warn and train in the smallest way. save_every `auto` writes a checkpoint
    by the clock, so that at most half a minute of training is lost; null writes one only when the run is stopped.
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
    loraplus_ratio: Number | None = Field(default=None, gt=0)
    eval_every: Integer | None = Field(default=None, ge=1)
    save_every: Literal["auto"] | Annotated[Integer, Field(ge=1)] | None = "auto"
    patience: Integer | None = Field(default=None, ge=1)
    grad_checkpoint: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = "auto"
    cache_prefix: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = "auto"
    memory_limit_gb: Number | None = Field(default=None, gt=0)
    on_memory: Literal["refuse", "warn"] = "refuse"

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
