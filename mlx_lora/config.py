"""The recipe: the one place where every setting, its default, its meaning and its validation lives.

`config_adapter.py` has the adapter's section, `recipe.py` reads the files. A field's description is what `mlx-lora
settings` and `train --help` say of it. A type here says what is built: a value that the contract names but no code
serves yet is not in the type, so asking for it is an error and never ignored. Nothing here imports MLX.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, field_validator, model_validator

from mlx_lora.config_adapter import Adapter, Glora
from mlx_lora.config_base import Integer, Number, Section, as_switch, known_name
from mlx_lora.methods import MODES

# data.template by name; the last five are for bases without a template.
TEMPLATE_FILE = ".jinja"
TEMPLATES = ("auto", "chat", "none", "chatml", "llama3", "gemma", "mistral", "alpaca")

__all__ = ["Adapter", "Data", "Glora", "Quantize", "Recipe", "Section", "Train"]

# What a column can be.
COLUMN_ROLES = ("prompt", "completion", "system", "messages", "text")


class Quantize(Section):
    """How to quantize the base before training. The adapter then belongs to the quantized base."""

    mode: str = Field(default="affine", examples=[*MODES], description="Number format of the packed weights.")
    bits: Integer | None = Field(default=None, description="Bits a weight; null is the mode's own.")
    group_size: Integer | None = Field(default=None, description="Weights that share a scale; null is the mode's own.")
    double_quant: bool = Field(default=False, description="Also pack nf4's scales.")

    @field_validator("mode")
    @classmethod
    def _mode(cls, value: str) -> str:
        return known_name(value, MODES)

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


class Data(Section):
    """Where rows come from and how they become tokens and loss weights.

    A value of `columns` is the name of a column, or a template with names of columns in braces, `{title} ({year})`.
    """

    path: str | None = Field(
        default=None, description="A file, a folder with train, valid and test, or one of documents."
    )
    format: Literal["auto", "text", "completions", "messages", "alpaca", "sharegpt"] = Field(
        default="auto", description="Shape of the rows; auto goes by their keys."
    )
    columns: dict[str, str] = Field(
        default={}, description="Which column is prompt, completion, system, messages or text."
    )
    system: str | None = Field(default=None, description="A system message for every row that has none.")
    me: str | None = Field(default=None, description="Whose messages in a chat or in mail are the answers.")
    query: str | None = Field(default=None, description="What to select from an SQLite database.")
    template: str = Field(
        default="auto",
        examples=[*TEMPLATES, "FILE.jinja"],
        description="Chat template: the model's own, none, or one for a base without.",
    )
    thinking: Annotated[Literal["auto", "on", "off"], BeforeValidator(as_switch)] = Field(
        default="auto", description="Ask models that think to think; auto where the row has reasoning."
    )
    template_args: dict[str, Any] = Field(
        default={}, examples=["{name: value}"], description="Arguments for the chat template."
    )
    drop: list[Literal["reasoning_content", "name", "tool_calls", "tools", "images"]] = Field(
        default=[], description="Parts to leave out, where the chat template doesn't show them."
    )
    mask: Literal["auto", "all", "completion", "assistant", "last"] = Field(
        default="auto", description="Which tokens carry loss; auto goes by the format."
    )
    max_seq_length: Integer = Field(default=2048, ge=2, description="Most tokens of a row.")
    too_long: Literal["error", "drop", "truncate-start", "truncate-end", "split"] = Field(
        default="error", description="What becomes of longer rows."
    )
    valid_fraction: Number = Field(
        default=0.1, ge=0, lt=1, description="Share of the rows set aside when there is no valid file."
    )
    packing: bool = Field(default=False, description="Put several short rows in one, kept apart.")

    @field_validator("template")
    @classmethod
    def _template(cls, value: str) -> str:
        return value if value.endswith(TEMPLATE_FILE) else known_name(value, TEMPLATES)

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @field_validator("columns")
    @classmethod
    def _columns_make_a_row(cls, columns: dict[str, str]) -> dict[str, str]:
        for role in columns:
            known_name(role, COLUMN_ROLES)
        if empty := [role for role, column in columns.items() if not column.strip()]:
            raise ValueError(f"{empty[0]} is empty, it takes a column's name")
        if columns and set(columns) - {"system"} not in ({"prompt", "completion"}, {"messages"}, {"text"}, set()):
            raise ValueError("a row is made of prompt and completion, of messages, or of text")
        if "text" in columns and "system" in columns:
            raise ValueError("plain text has no system message")
        return columns

    @field_validator("system", "me", "query")
    @classmethod
    def _says_something(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("is empty, null leaves it out")
        return value


Auto = Literal["auto"]
Chosen = TypeVar("Chosen")


def number(value: Chosen | Auto) -> Chosen:
    """A setting that is no longer `auto`. Raises ValueError for one that still is: `train.automatic.choose` sets it."""
    if value == "auto":
        raise ValueError("a setting of train is still auto; train.automatic.choose makes a number of it")
    return value


class Train(Section):
    """The loop. One optimizer step is batch_size × grad_accumulation rows, over all processes together.

    grad_checkpoint `auto` recomputes layers where a step's activations would not fit the free memory; cache_prefix
    `auto` keeps what enters the first adapted layer where that is a later one, there is room, and rows come again.
    epochs, learning_rate, eval_every and patience `auto` become numbers once the rows are read (`train.automatic`).
    memory_limit_gb, in GiB, is what training may take, more or less than the machine recommends. on_memory says what
    happens where that isn't enough: refuse, or warn and train in the smallest way. save_every `auto` writes a
    checkpoint by the clock, so that at most half a minute of training is lost; null writes one only when the run is
    stopped. Over max_drift a validation isn't taken as the best, and the second one in a row ends the run.
    """

    epochs: Auto | Annotated[Integer, Field(ge=1)] = Field(
        default="auto", description="Passes over the training rows; auto by their number."
    )
    iters: Integer | None = Field(default=None, ge=1, description="Optimizer steps; overrides epochs.")
    batch_size: Integer = Field(default=4, ge=1, description="Rows of a micro-batch.")
    grad_accumulation: Integer = Field(default=1, ge=1, description="Micro-batches of an optimizer step.")
    learning_rate: Auto | Annotated[Number, Field(gt=0)] = Field(
        default="auto", description="Highest learning rate; auto by base, method and steps."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="How the learning rate falls after the warm-up."
    )
    warmup: Number = Field(default=0.03, ge=0, lt=1, description="Share of the steps in which the learning rate rises.")
    optimizer: Literal["adam", "adamw", "sgd", "lion", "adafactor", "muon"] = Field(
        default="adamw", description="Update rule."
    )
    weight_decay: Number = Field(default=0.0, ge=0, description="Pull of the weights towards zero; not for adam.")
    max_grad_norm: Number | None = Field(
        default=1.0, gt=0, description="Norm that gradients are clipped to; null doesn't clip."
    )
    loraplus_ratio: Number | None = Field(
        default=None, gt=0, description="LoRA+: B's learning rate over A's; null is the same."
    )
    eval_every: Auto | Annotated[Integer, Field(ge=1)] | None = Field(
        default="auto", description="Steps between validations; null is only the end."
    )
    save_every: Literal["auto"] | Annotated[Integer, Field(ge=1)] | None = Field(
        default="auto", description="Steps between checkpoints; auto: by time, null: only when stopped."
    )
    patience: Auto | Annotated[Integer, Field(ge=1)] | None = Field(
        default="auto", description="Validations without gain before training stops."
    )
    max_drift: Number | None = Field(
        default=None, gt=0, description="Most nats of KL from the base on the validation rows."
    )
    grad_checkpoint: Annotated[Literal["auto", "on", "off"], BeforeValidator(as_switch)] = Field(
        default="auto", description="Compute layers again instead of keeping them: slower, less memory."
    )
    cache_prefix: Annotated[Literal["auto", "on", "off"], BeforeValidator(as_switch)] = Field(
        default="auto", description="Keep what enters the first adapted layer, for rows that come again."
    )
    memory_limit_gb: Number | None = Field(
        default=None, gt=0, description="GiB that training may take; null is what the machine recommends."
    )
    on_memory: Literal["refuse", "warn"] = Field(
        default="refuse", description="What happens where the memory isn't enough: refuse, or warn and try."
    )

    @model_validator(mode="after")
    def _check(self) -> Train:
        faults = []
        if self.patience not in (None, "auto") and self.eval_every is None:
            faults.append("patience counts evaluations, and eval_every is not set")
        if self.weight_decay and self.optimizer == "adam":
            faults.append("weight_decay is not part of adam; adamw has it")
        if faults:
            raise ValueError("; ".join(faults))
        return self


class Recipe(Section):
    """Everything that decides a training run."""

    model: str | None = Field(default=None, description="The base: a directory or a name.")
    name: str | None = Field(default=None, description="The adapter's name; a recipe file's own by default.")
    quantize: Quantize | None = None
    adapter: Adapter = Adapter()
    data: Data = Data()
    train: Train = Train()
    seed: Integer = Field(
        default=0, ge=0, lt=2**64, description="Draws the order of rows, the start of the adapter and dropout."
    )

    @field_validator("adapter", "data", "train", mode="before")
    @classmethod
    def _section(cls, value: Any) -> Any:
        return {} if value is None else value  # a heading whose keys are all commented out
