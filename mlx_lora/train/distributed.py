"""Several processes that train one adapter, each on its share of every optimizer step (data parallel).

The processes are those of MLX's own launcher: `mlx.launch … -- mlx-lora train …`. Sums of losses, gradients and tokens
are added over all of them once an optimizer step and divided once, so that the result is that of one process with all
rows. A process that runs alone sums with nobody.

What may fail on one process alone (its plan, its data, its disk) runs inside `agreed`: afterwards every process knows
whether it failed on any, and all end together. What fails later breaks the connection, and the others notice that at
their next sum.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.errors import MlxLoraError, PeerFailed, TrainingError

# Set for the processes of mlx.launch: by itself, or by the mpirun that it calls.
LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
# How the errors of MLX's backends begin.
BACKEND_ERROR = re.compile(r"\[(ring|jaccl|mpi|nccl|distributed)\]", re.IGNORECASE)


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
        return [sum(column) for column in zip(*self.gather(list(numbers)), strict=True)]

    def gather(self, value: Any) -> list[Any]:
        """A JSON value of each process, by rank, on all of them."""
        if self.size == 1:
            return [value]
        sent = np.frombuffer(json.dumps(value).encode(), np.uint8)
        lengths = mx.distributed.all_gather(mx.array([[len(sent)]], mx.int32), group=self._group).reshape(-1).tolist()
        padded = mx.array(np.pad(sent, (0, max(lengths) - len(sent))))
        everyone = np.array(mx.distributed.all_gather(padded[None], group=self._group))
        return [json.loads(line[:length].tobytes()) for line, length in zip(everyone, lengths, strict=True)]

    def arrays_of_first(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """The first process's arrays on all of them, bit by bit; what another one passes is ignored."""
        if self.size == 1:
            return arrays
        shapes = self.gather([[name, str(array.dtype), array.shape] for name, array in arrays.items()])[0]
        received = {}
        for name, dtype, shape in shapes:
            kind: mx.Dtype = getattr(mx, dtype.rpartition(".")[2])
            sent = arrays[name] if self.rank == 0 else mx.zeros(shape, kind)
            # added as bytes, of which all but the first process's are zero: also -0.0 and NaN arrive as they are
            total = mx.distributed.all_sum(sent.reshape(-1).view(mx.uint8), group=self._group)
            received[name] = total.view(kind).reshape(shape)
            mx.eval(received[name])
        return received

    def check_same(self, what: dict[str, str]) -> None:
        """Raise PeerFailed, on every process alike, naming what isn't the same text on all of them."""
        digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in what.items()}
        everyone = self.gather(digests)
        if differ := [name for name in what if any(other.get(name) != digests[name] for other in everyone)]:
            raise PeerFailed(
                f"the machines don't have the same {' and '.join(differ)}",
                hint="every machine needs the same model, data and recipe",
            )

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Run a block that may fail on some processes alone; if it did on any, all raise.

        The first process raises its own error, or PeerFailed with another's; the others raise PeerFailed.
        """
        if self.size == 1:
            yield
            return
        fault: MlxLoraError | OSError | None = None
        try:
            yield
        except (MlxLoraError, OSError) as error:
            fault = error
        verdicts = self.gather([str(fault), getattr(fault, "hint", None)] if fault else None)
        failed = [(rank, *verdict) for rank, verdict in enumerate(verdicts) if verdict]
        if not failed:
            return
        if self.rank == 0 and fault:
            raise fault
        rank, message, hint = failed[0]
        raise PeerFailed(f"process {rank + 1} of {self.size}: {message}", hint=hint) from fault

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Run a block that sums with other processes. Raises TrainingError when one of them can't be reached."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not BACKEND_ERROR.match(str(error)):
                raise
            raise TrainingError(
                f"another process of this run has ended, and training can't go on without it ({error})",
                hint="--resume goes on from the last checkpoint, if there is one, with as many processes",
            ) from error


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
