"""Restore a model's arrays after a pass that has replaced some of them.

A few models assign to their own attributes while they run: Gemma 3n replaces a weight by its clipped version, Kimi K3
caches a product of a norm and a projection for its next pass. Under `mx.compile` and in gradients such an array is a
tracer and is invalid after the pass. The base's own arrays must also stay the same objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.nn as nn


@contextmanager
def arrays_kept(model: nn.Module) -> Iterator[None]:
    """When the block ends, also by an error, `model` has exactly the arrays that it had before."""
    saved = [(module, dict(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, items, attributes in saved:
            for name in [name for name in module if name not in items]:
                module.pop(name)
            for name, value in items.items():
                if module.get(name) is not value:
                    module[name] = value  # keeps the key's position: a compiled step identifies arrays by their order
            vars(module).clear()
            vars(module).update(attributes)
