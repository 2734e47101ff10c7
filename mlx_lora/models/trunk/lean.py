"""Attention, gated activations and recurrences that keep only their inputs for the backward pass.

The rest is recomputed. What layers keep for the backward pass limits how long a row may be. Attention's scores grow
with the square of the row's length. A gated activation keeps five arrays of the MLP's width, and two are enough. Both
are cheap to recompute, unlike the matrix products around them.

mlx-lm's layers call a module-level function for each of these. So each layer object gets a subclass whose methods are
the same code with our functions in place of mlx-lm's. The original classes are restored when the block ends; no class
and no module is patched.

Recurrences run in the exact chunked forms of `models.recurrence`, which also reset at the borders of packed rows.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import mlx.nn as nn

from mlx_lora.machine import allocation, device
from mlx_lora.models.recurrence import (
    CausalConv1d,
    current_segments,
    gated_delta_update,
    is_short,
    recurrent_gla,
    resetting,
    ssm_update,
)
from mlx_lora.models.trunk import activations, attention
from mlx_lora.models.trunk.segments import segments_of

with allocation.file_limits_kept():
    from mlx_lm.models import activations as theirs
    from mlx_lm.models import bailing_hybrid, bailing_moe_linear, base, gated_delta, ssm


@contextmanager
def lean(layers: list[nn.Module], *, without: frozenset[str] = frozenset()) -> Iterator[None]:
    """While the block runs, `layers` keep less for the backward pass; on a GPU, evaluation uses mlx-lm's own functions.

    Recurrences and short convolutions also reset at the borders of packed rows. PARTS named in `without` stay
    mlx-lm's own.
    """
    modules = {id(module): module for layer in layers for module in layer.modules()}  # by id: some modules are shared
    classes = {key: cls for key, module in modules.items() if (cls := _lean_class_of(module, without))}
    running = [layer for layer in layers if any(parts_of(module) & RUNNING for module in layer.modules())]
    classes |= {
        id(layer): _resetting_class(classes.get(id(layer), type(layer)))  # type: ignore[arg-type]
        for layer in running
    }
    originals = {key: type(modules[key]) for key in classes}
    try:
        for key, cls in classes.items():
            modules[key].__class__ = cls
        yield
    finally:
        for key, original in originals.items():
            modules[key].__class__ = original


def _lean_class_of(module: nn.Module, without: frozenset[str]) -> type[nn.Module] | None:
    """The class that a module gets while `lean` is active, or None if it keeps its own."""
    if type(module) is nn.Conv1d:
        return CausalConv1d if "convolution" not in without and is_short(module) else None
    return _lean_class(type(module), without)  # type: ignore[arg-type]


def parts_of(module: nn.Module) -> frozenset[str]:
    """The PARTS that a module uses."""
    if type(module) is nn.Conv1d:
        return frozenset({"convolution"} if is_short(module) else ())
    return _parts_called(type(module))  # type: ignore[arg-type]


@lru_cache
def _resetting_class(original: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a layer that runs inside `resetting`, with the packed rows' segments from the layer's cache."""

    def call(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        segments = segments_of([*arguments, *named.values()])
        if segments is None:
            return original.__call__(self, *arguments, **named)
        with resetting(segments):
            return original.__call__(self, *arguments, **named)

    return type(f"Resetting{original.__name__}", (original,), {"__call__": call})


@lru_cache
def _lean_class(original: type[nn.Module], without: frozenset[str]) -> type[nn.Module] | None:
    """A subclass whose methods call the lean functions, or None if its methods call none of them."""
    methods = {name: copy for name, method in _methods(original) if (copy := _lean_method(method, without))}
    return type(f"Lean{original.__name__}", (original,), methods) if methods else None


@lru_cache
def _parts_called(original: type[nn.Module]) -> frozenset[str]:
    """The PARTS that a class's methods call."""
    return frozenset(part for _, method in _methods(original) for part, *_ in _calls(method))


def _methods(original: type[nn.Module]) -> Iterator[tuple[str, types.FunctionType]]:
    for name in dir(original):
        method = inspect.getattr_static(original, name)
        if isinstance(method, types.FunctionType) and name != "__init__":
            yield name, method


def _calls(method: types.FunctionType) -> Iterator[tuple[str, str, Any]]:
    """(part, name, our function) for each function in FUNCTIONS that a method calls by name."""
    for part, name, original, ours in FUNCTIONS:
        if name in method.__code__.co_names and method.__globals__.get(name) is original:
            yield part, name, ours
    if {"nn", "silu"} <= set(method.__code__.co_names) and method.__globals__.get("nn") is nn:
        yield "activation", "nn", LAYERS


def _lean_method(method: types.FunctionType, without: frozenset[str]) -> Callable[..., Any] | None:
    """The method with calls to the lean functions, or None if it calls none of them.

    On a GPU, in evaluation mode and without packed rows, it still calls mlx-lm's functions.
    """
    ours = {name: function for part, name, function in _calls(method) if part not in without}
    if not ours:
        return None
    lean_method = types.FunctionType(
        method.__code__, {**method.__globals__, **ours}, method.__name__, method.__defaults__, method.__closure__
    )
    lean_method.__kwdefaults__ = method.__kwdefaults__

    def call(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        use_original = device.on_gpu() and not self.training and current_segments() is None
        return (method if use_original else lean_method)(self, *arguments, **named)

    return call


# (part, name under which mlx-lm's layers call the function, mlx-lm's function, our replacement)
FUNCTIONS: list[tuple[str, str, Any, Callable[..., Any]]] = [
    ("activation", "swiglu", theirs.swiglu, activations.swiglu),
    ("activation", "precise_swiglu", theirs.precise_swiglu, activations.precise_swiglu),
    (
        "attention",
        "scaled_dot_product_attention",
        base.scaled_dot_product_attention,
        attention.scaled_dot_product_attention,
    ),
    ("recurrence", "gated_delta_update", gated_delta.gated_delta_update, gated_delta_update),
    ("recurrence", "ssm_update", ssm.ssm_update, ssm_update),
    ("recurrence", "recurrent_gla", bailing_moe_linear.recurrent_gla, recurrent_gla),
    ("recurrence", "recurrent_gla", bailing_hybrid.recurrent_gla, recurrent_gla),
]
# mlx-lm's layers call SiLU as `nn.silu`, so their methods get this copy of `nn` in which `silu` is ours.
LAYERS = types.SimpleNamespace(**{**vars(nn), "silu": activations.silu})
# Parts that run along the positions of a row. Only our versions reset at the borders of packed rows.
RUNNING = frozenset({"recurrence", "convolution"})
PARTS = frozenset(part for part, *_ in FUNCTIONS) | RUNNING
