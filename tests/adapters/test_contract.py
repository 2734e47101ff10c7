"""The contract of a method holds when its class is defined: nn.Module's metaclass isn't abc's."""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType
from typing import Any

import pytest

from mlx_lora import methods
from mlx_lora.adapters import lora_conv
from mlx_lora.adapters.base import REQUIRED, AdapterLayer
from mlx_lora.adapters.lora import LoRA, LoRALinear
from mlx_lora.adapters.mixed import MixedLayer

ABSTRACT = {"LoRA", "DoRA", "QALoRA", "VeRA", "AdaLoRA"}


def classes(of: type = AdapterLayer) -> Iterator[type]:
    """Every class of every method; wrappers that hold several adapters are of none."""
    for cls in of.__subclasses__():
        if cls.__module__.startswith("mlx_lora.") and cls is not MixedLayer:
            yield cls
            yield from classes(cls)


for name in methods.METHODS:
    methods.resolve(name)
KINDS = sorted({cls for cls in classes() if cls.__name__ not in ABSTRACT}, key=lambda cls: cls.__name__)


def test_every_method_has_classes_that_are_for_use() -> None:
    modules = {methods.METHODS[name].partition(":")[0] for name in methods.METHODS} | {lora_conv.__name__}
    assert {cls.__module__ for cls in KINDS} == modules


@pytest.mark.parametrize("part", REQUIRED)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_abstractmethod_enforces_the_contract_on_a_module(kind: type, part: str) -> None:
    """A class with all that this method's class has but one part is refused; with that part it isn't."""
    parents = [vars(parent) for parent in reversed(kind.__mro__) if issubclass(parent, AdapterLayer)][1:]
    whole: dict[str, Any] = {
        name: value for namespace in parents for name, value in namespace.items()
        if name in (*REQUIRED, "fuse", "refusal") or isinstance(value, FunctionType)
    }  # fmt: skip
    type("Whole", (AdapterLayer,), dict(whole))
    del whole[part]
    with pytest.raises(TypeError, match=f"^Lacking lacks {part} of the contract"):
        type("Lacking", (AdapterLayer,), whole)


@pytest.mark.parametrize(("method", "part"), [("dora", "sides"), ("qalora", "masters")])
def test_what_a_method_asks_of_its_own_kinds_of_layers_is_enforced_too(method: str, part: str) -> None:
    (shared,) = {cls for cls in classes() if cls.__name__.lower() == method}
    with pytest.raises(TypeError, match=f"lacks .*{part}"):
        type("Lacking", (shared,), {"__call__": lambda self, x: x})


def test_a_class_that_only_shares_is_declared_as_such() -> None:
    class Shared(LoRA, abstract=True):
        pass

    with pytest.raises(TypeError, match="Half lacks __call__, delta of the contract"):
        type("Half", (Shared,), {})

    class Whole(LoRALinear):
        pass

    assert issubclass(Whole, AdapterLayer)
