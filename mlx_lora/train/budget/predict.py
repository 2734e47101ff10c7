"""What a training step will hold at its peak, by arithmetic on shapes, before a weight is loaded.

    peak = fixed + the most of what is alive in one of the phases of a step

    fixed       weights, adapter, the optimizer's state, and the zeros that gradients are added to
    loss        what the layers keep, the hidden states with their gradient, and some tiles of logits
    backward    what the layers keep, and the temporaries of one of them
    update      some arrays for each array of the adapter

What layers keep is read off them (`costs`). With gradient checkpointing each keeps its input, and one of them
the rest. How many temporaries are alive can't be read off: COEFFICIENTS are fitted to measured peaks by
`python -m tests.bench plan`. It doesn't know what a machine has, nor what else could be chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass

from mlx_lora.machine.allocation import HELD_BACK
from mlx_lora.models.trunk.attention import SCORES_BYTES, SCORES_BYTES_GPU
from mlx_lora.quant.matmul import BLOCK_BYTES
from mlx_lora.train.budget.costs import Costs
from mlx_lora.train.objectives.likelihood import LEAST_ROWS, TILE_BYTES, TILE_BYTES_GPU

# MLX's own limits on how far it runs ahead of a GPU: command buffers, and bytes of results in each.
COMMAND_BUFFERS, COMMAND_BYTES = 10, 50 << 20


@dataclass(frozen=True)
class Coefficients:
    """How many are alive at once: `tiles` of logits, `states` of the hidden states with loss; in attention's backward
    pass, parts of its `scores`, `squares` that it is handed as a mask, and arrays of the `hidden` size; in that of a
    recurrence, arrays of all that is `mixed`; in that of what follows them, arrays of the `inner` size and unpacked
    `blocks` of weights; `updates` of the adapter's arrays; and `prepared`, how much MLX's CPU
    backend allocates before it computes, of what `allocation.hold_back` lets it."""

    tiles: float
    states: float
    scores: float
    hidden: float
    inner: float
    blocks: float
    updates: float
    prepared: float
    squares: float
    mixed: float


COEFFICIENTS = Coefficients(
    tiles=5.824,
    states=4.818,
    scores=5.616,
    hidden=3.779,
    inner=4.659,
    blocks=1.46,
    updates=2.765,
    prepared=0.518,
    squares=3.4,
    mixed=1.8,
)


@dataclass(frozen=True)
class Micro:
    """A micro-batch: `lines` of `width` positions, padding included, of which `trained` carry loss."""

    lines: int
    width: int
    trained: int

    @property
    def positions(self) -> int:
        return self.lines * self.width


@dataclass(frozen=True)
class Parts:
    """Bytes of what is alive at the peak; together they are the peak."""

    weights: int
    adapter: int
    optimizer: int
    activations: int
    loss: int
    overhead: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


def predict(
    costs: Costs, micro: Micro, *, recompute: bool, correction: float = 1.0, using: Coefficients = COEFFICIENTS
) -> Parts:
    """The parts of the peak of a step of micro-batches like `micro`; `recompute` is gradient checkpointing.

    `correction` multiplies everything but weights, adapter and optimizer state: what this machine has shown.
    """
    kept = costs.entering(micro.lines, micro.width) if recompute else costs.kept(micro.lines, micro.width)
    phases = [
        (0, kept, _loss(costs, micro, using)),
        *((0, kept + backward, 0) for backward in _backward(costs, micro, recompute, using)),
        (using.updates * costs.adapter, 0, 0),
    ]
    gradients, activations, loss = (int(correction * part) for part in max(phases, key=sum))
    temporary = gradients + activations + loss
    return Parts(
        weights=costs.weights,
        adapter=costs.adapter,
        optimizer=costs.state + costs.adapter + gradients,
        activations=activations,
        loss=loss,
        overhead=_next_step(costs, temporary) if costs.gpu else int(using.prepared * min(HELD_BACK, temporary // 8)),
    )


def _next_step(costs: Costs, temporary: int) -> int:
    """What a GPU holds of the step that is dispatched before the last one has ended.

    That step's temporaries, its new adapter and its new optimizer state are allocated when MLX encodes them, while the
    step before still needs its own. MLX encodes at most COMMAND_BUFFERS ahead of the GPU, each ended after
    COMMAND_BYTES of results, and waits then. These are the settings of MLX's sources; nothing here is fitted.
    """
    return min(COMMAND_BUFFERS * COMMAND_BYTES, temporary + costs.state + costs.adapter)


def _loss(costs: Costs, micro: Micro, using: Coefficients) -> float:
    """Tiles of logits, and hidden states of the positions with loss."""
    most = max((TILE_BYTES_GPU if costs.gpu else TILE_BYTES) // (4 * costs.vocabulary), LEAST_ROWS)
    count = max(-(-micro.trained // most), 1)
    tile = 4 * costs.vocabulary * -(-micro.trained // count)
    return using.tiles * tile + using.states * costs.size * costs.hidden * micro.trained


def _backward(costs: Costs, micro: Micro, recompute: bool, using: Coefficients) -> Iterator[float]:
    """Beside what all layers keep: temporaries of each layer's attention or recurrence, and of what follows it.

    A layer that is computed again holds all that it keeps. Without checkpointing, what only the part after attention
    needs (MLP activations) is already freed when attention's backward runs.
    """
    size = costs.size * micro.positions
    for place, layer in enumerate(costs.below + costs.layers):
        adapted = place >= len(costs.below)
        again = costs.kept_by(layer, micro.lines, micro.width) if recompute and adapted else 0
        freed = size * layer.after_attention if adapted and not recompute else 0
        scores = using.scores * min(
            SCORES_BYTES_GPU if costs.gpu else SCORES_BYTES, 4 * micro.lines * layer.heads * micro.width**2
        )
        if layer.masked:  # squares as a whole; a layer that is computed again makes them once more
            scores = (using.squares + recompute) * size * layer.masked * micro.width
        sliced = size * layer.sliced * micro.width
        yield again - freed + scores + using.hidden * size * costs.hidden + sliced
        if layer.scans:
            mixer = max(using.mixed * size * layer.mixed, costs.span_bytes(layer, micro.lines, micro.width))
            yield again - freed + mixer
        blocks = min(BLOCK_BYTES, 4 * layer.weight) if costs.bits and not costs.gpu else 0
        directions = 3 if recompute else 1  # measured: products of the pass that is made again overlap
        yield again + using.inner * size * layer.inner + using.blocks * directions * blocks
