"""Where a token's row is, after mlx_lm has sorted tokens by the experts that they go to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from mlx_lora.machine import allocation

with allocation.file_limits_kept():
    from mlx_lm.models import switch_layers

# Of each sorted choice of an expert: the index of its token among all tokens, (tokens · experts per token,).
OnOrder = Callable[[mx.array], None]


@contextmanager
def noting_order(note: OnOrder) -> Iterator[None]:
    """While the block runs, call `note` with the order of tokens whenever a module of experts sorts them.

    From 64 choices on mlx_lm sorts tokens, and its expert layers see no rows any more. The order that is noted is that
    of the layers that run next. Only the thread that runs models may use this.
    """
    original = switch_layers._gather_sort

    def sort(x: mx.array, indices: mx.array) -> Any:
        note(mx.argsort(indices.flatten()) // indices.shape[-1])
        return original(x, indices)

    switch_layers._gather_sort = sort
    try:
        yield
    finally:
        switch_layers._gather_sort = original
