"""A model's arrays, put back as they were after a pass that has replaced some of them.

A few models write into themselves while they run: Gemma 3n clips a weight in place of the old one, Kimi K3 keeps what
it has computed of a norm and a projection for its next pass. Under `mx.compile` and in gradients such an array is a
tracer, which means nothing afterwards; and a base's own arrays are never exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.nn as nn


@contextmanager
def arrays_kept(model: nn.Module) -> Iterator[None]:
    """Behind the block, also after an error, `model` has the arrays that it had before."""
    before = [(module, dict(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, items, attributes in before:
            for name in [name for name in module if name not in items]:
                module.pop(name)
            for name, value in items.items():
                if module.get(name) is not value:
                    module[name] = value  # in its place: a compiled step knows arrays by their order
            vars(module).clear()
            vars(module).update(attributes)
