"""The recipe's `adapter:` section: method, rank, scale and place, and which settings belong to which method."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mlx_lora.config_base import Integer, Number, Section, known_name
from mlx_lora.methods import COMBINATIONS, INITIALISATIONS, LORA_ONLY, METHODS, SETTINGS, TARGETS


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

    method: str = Field(
        default="lora", examples=[*METHODS, *COMBINATIONS], description="What is attached to the frozen base."
    )
    rank: Integer = Field(default=8, ge=1, description="Rank of the update: what it can learn, and its size.")
    alpha: Number = Field(default=16, gt=0, description="Scale of the update, which is (alpha / rank) · B A.")
    dropout: Number = Field(
        default=0.0, ge=0, lt=1, description="Share of inputs that the adapter doesn't see in a step."
    )
    targets: str | list[str] = Field(
        default="attention",
        examples=["attention", "all-linear", "[q_proj, v_proj]", "/regex/"],
        description="Layers to adapt: a set, names, or a /regex/.",
    )
    layers: Literal["all"] | Annotated[Integer, Field(ge=1)] | list[Integer] = Field(
        default="all", description="all, the last N, or indices from 0."
    )
    init: str = Field(default="default", examples=[*INITIALISATIONS], description="How LoRA's factors start.")
    rslora: bool = Field(default=False, description="Scale by alpha / √rank instead of alpha / rank.")
    rank_pattern: dict[str, Annotated[Integer, Field(ge=1)]] = Field(
        default={}, description="Other ranks, by module name or regex."
    )
    alpha_pattern: dict[str, Annotated[Number, Field(gt=0)]] = Field(
        default={}, description="Other alphas, by module name or regex."
    )
    glora: Glora = Field(default=Glora(), description="What trains in glora, for each of A to E.")
    projection_seed: Integer = Field(default=0, ge=0, lt=2**64, description="Draws the frozen matrices of vera.")
    virtual_tokens: Integer = Field(default=16, ge=1, description="Trained positions of prefix and prompt.")
    position: Literal["prefix", "infix"] = Field(
        default="prefix", description="prompt's tokens go before the row, or between prompt and answer."
    )
    bottleneck: Integer = Field(default=16, ge=1, description="Width of bottleneck's hidden layer.")
    target_rank: Integer | None = Field(
        default=None, ge=1, description="Mean rank that adalora prunes to; null is half."
    )
    prune_from: Number = Field(default=0.1, ge=0, le=1, description="Share of the steps before adalora prunes.")
    prune_until: Number = Field(default=0.5, ge=0, le=1, description="Share of the steps by which adalora has pruned.")
    prune_every: Integer = Field(default=10, ge=1, description="Steps from one pruning of adalora to the next.")
    orthogonal: Number = Field(default=0.5, ge=0, description="Weight of adalora's orthogonality in the loss.")

    zero_points: Literal["stored", "float32"] = Field(
        default="stored",
        description="Zero-points that qalora trains for: as the base stores them, or float32.",
    )

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
        return known_name(value, [*METHODS, *COMBINATIONS])

    @field_validator("init")
    @classmethod
    def _init(cls, value: str) -> str:
        return known_name(value, INITIALISATIONS)

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
