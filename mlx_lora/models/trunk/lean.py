"""Attention, gated activations and recurrences that keep their inputs for the backward pass and compute the rest again.

What a layer keeps decides how long a row fits in memory: attention's scores grow with the square of its length, and a
gated activation holds five arrays of the widest size where two are enough. Both are cheap to compute again, unlike the
matrix products around them. mlx-lm's layers call one function for each, so the layers run here with their own code and
two functions of ours in place of mlx-lm's, object by object and undone on leaving; no class and no module is patched.

Recurrences run in the exact chunked forms of `models.recurrence`, which also stop at the borders of packed rows.
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
    """While the block runs, `layers` keep less for the backward pass; on a GPU, evaluation is left as it is.

    Recurrences and short convolutions also stop at the borders of packed rows. `without` names PARTS that stay
    mlx-lm's own.
    """
    modules = {id(module): module for layer in layers for module in layer.modules()}  # some are shared
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
    """The class that a module is given, or None where it stays as it is."""
    if type(module) is nn.Conv1d:
        return CausalConv1d if "convolution" not in without and is_short(module) else None
    return _lean_class(type(module), without)  # type: ignore[arg-type]


def parts_of(module: nn.Module) -> frozenset[str]:
    """The PARTS that a module runs in."""
    if type(module) is nn.Conv1d:
        return frozenset({"convolution"} if is_short(module) else ())
    return _replaced(type(module))  # type: ignore[arg-type]


@lru_cache
def _resetting_class(original: type[nn.Module]) -> type[nn.Module]:
    """A layer that tells what runs inside it where packed rows begin, which its cache knows."""

    def call(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        segments = segments_of([*arguments, *named.values()])
        if segments is None:
            return original.__call__(self, *arguments, **named)
        with resetting(segments):
            return original.__call__(self, *arguments, **named)

    return type(f"Resetting{original.__name__}", (original,), {"__call__": call})


@lru_cache
def _lean_class(original: type[nn.Module], without: frozenset[str]) -> type[nn.Module] | None:
    """A subclass whose methods call the lean functions, or None where they would call none."""
    methods = {name: made for name, method in _methods(original) if (made := _changed(method, without))}
    return type(f"Lean{original.__name__}", (original,), methods) if methods else None


@lru_cache
def _replaced(original: type[nn.Module]) -> frozenset[str]:
    """The PARTS that a class's methods call."""
    return frozenset(part for _, method in _methods(original) for part, *_ in _calls(method))


def _methods(original: type[nn.Module]) -> Iterator[tuple[str, types.FunctionType]]:
    for name in dir(original):
        method = inspect.getattr_static(original, name)
        if isinstance(method, types.FunctionType) and name != "__init__":
            yield name, method


def _calls(method: types.FunctionType) -> Iterator[tuple[str, str, Any]]:
    """(part, name, ours) of each function that a method calls by name and that has one in its place."""
    for part, name, original, ours in FUNCTIONS:
        if name in method.__code__.co_names and method.__globals__.get(name) is original:
            yield part, name, ours
    if {"nn", "silu"} <= set(method.__code__.co_names) and method.__globals__.get("nn") is nn:
        yield "activation", "nn", LAYERS


def _changed(method: types.FunctionType, without: frozenset[str]) -> Callable[..., Any] | None:
    """A method that calls the lean functions while training, or None where it would call none."""
    ours = {name: function for part, name, function in _calls(method) if part not in without}
    if not ours:
        return None
    again = types.FunctionType(
        method.__code__, {**method.__globals__, **ours}, method.__name__, method.__defaults__, method.__closure__
    )
    again.__kwdefaults__ = method.__kwdefaults__

    def call(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        own = device.on_gpu() and not self.training and current_segments() is None
        return (method if own else again)(self, *arguments, **named)

    return call


# part, the name that mlx-lm's layers call a function by, mlx-lm's function, and the one in its place
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
# mlx-lm's layers call this one as `nn.silu`, so they get another `nn`.
LAYERS = types.SimpleNamespace(**{**vars(nn), "silu": activations.silu})
# What runs along the row, and stops at the borders of packed rows only in our form.
RUNNING = frozenset({"recurrence", "convolution"})
PARTS = frozenset(part for part, *_ in FUNCTIONS) | RUNNING
