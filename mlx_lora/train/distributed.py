"""Several processes that train one adapter, each on its share of every optimizer step (data parallel).

The processes are those of MLX's own launcher: `mlx.launch … -- mlx-lora train …`. Sums of losses, gradients and tokens
are added over all of them once an optimizer step and divided once, so that the result is that of one process with all
rows. A process that runs alone sums with nobody.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.errors import TrainingError

# Set for the processes of mlx.launch: by itself, or by the mpirun that it calls.
LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


class Processes:
    """This process among `size`; `rank` 0 is the one that writes and speaks."""

    def __init__(self, group: Any = None):
        self._group = group
        self.rank: int = group.rank() if group else 0
        self.size: int = group.size() if group else 1

    @property
    def share(self) -> tuple[int, int]:
        """(rank, size): which rows of a step are this process's."""
        return self.rank, self.size

    def sum(self, tree: Any) -> Any:
        """Every array of a tree added over all processes, in one message."""
        if self.size == 1:
            return tree
        names, arrays = zip(*tree_flatten(tree), strict=True)
        flat = mx.concatenate([array.reshape(-1).astype(mx.float32) for array in arrays])
        parts = mx.split(mx.distributed.all_sum(flat, group=self._group), _ends(arrays))
        shaped = (part.reshape(array.shape) for part, array in zip(parts, arrays, strict=True))
        summed = tree_unflatten(list(zip(names, shaped, strict=True)))
        return tuple(summed) if isinstance(tree, tuple) else summed

    def count(self, *numbers: int) -> list[int]:
        """Whole numbers added over all processes."""
        if self.size == 1:
            return list(numbers)
        halves = mx.array([divmod(number, 1 << 20) for number in numbers], mx.int32)
        return [int(high * (1 << 20) + low) for high, low in mx.distributed.all_sum(halves, group=self._group).tolist()]

    def check_same(self, what: dict[str, str]) -> None:
        """Raise TrainingError, on every process alike, naming what isn't the same text on all of them."""
        if self.size == 1:
            return
        digests = mx.array([[*hashlib.sha256(text.encode()).digest()] for text in what.values()], mx.int32)
        everyone = mx.distributed.all_gather(digests[None], group=self._group)
        same = (everyone == everyone[:1]).all(axis=(0, 2)).tolist()
        if differ := [name for name, agrees in zip(what, same, strict=True) if not agrees]:
            raise TrainingError(
                f"the machines don't have the same {' and '.join(differ)}",
                hint="every machine needs the same model, data and recipe",
            )


def processes() -> Processes:
    """The processes that mlx.launch started together, or this one alone. Raises TrainingError when they can't meet."""
    if not any(name in os.environ for name in LAUNCHED):
        return Processes()
    try:
        return Processes(mx.distributed.init(strict=True))
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"started by mlx.launch, but the processes can't reach each other: {error}") from error


def _ends(arrays: Any) -> list[int]:
    ends, total = [], 0
    for array in arrays[:-1]:
        total += array.size
        ends.append(total)
    return ends
