"""What every section of the recipe is made of: strict numbers, names from a table, and the base class."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError

from mlx_lora.errors import nearest


def known_name(value: str, known: Iterable[str]) -> str:
    """`value` where it is one of `known`. Raises ValueError naming the nearest one."""
    if value not in known:
        raise ValueError(f"{value!r} is not known here{nearest(str(value), known)}")
    return value


def as_switch(value: Any) -> Any:
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
