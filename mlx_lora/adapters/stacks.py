"""Factors of several adapters of one module, in stacks that `mx.gather_mm` reads row by row.

A stack holds the adapters of one rank class, a power of two: smaller ranks are padded with zeros, which is exact. One
stack for all ranks would have to be sliced for a batch of small ones, and a slice along the rank copies the stack. A
stack's slots double when they are full. Slot 0 is no adapter: zeros.

    linear       a (slots, in, R)           b (slots, R, out)
    embedding    a (slots, vocabulary, R)   b (slots, R, dim)
    experts      a (slots, E, in, R)        b (slots, E, R, out)

The scale is part of b. Arrays have the dtype of the activations that they are multiplied with.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_lora.adapters.attach import Wrappers
from mlx_lora.adapters.base import ADAPTABLE, EXPERTS, AdapterLayer
from mlx_lora.adapters.dora import DoRA
from mlx_lora.adapters.lora import LoRA
from mlx_lora.adapters.qalora import QALoRA
from mlx_lora.adapters.vera import VeRA

# Ranks up to here share a class: below it a product takes as long.
LEAST_RANK = 4
# VeRA's matrices are written out for each adapter, which is cheap up to this rank.
MOST_VERA_RANK = 64


@dataclass(frozen=True)
class Factors:
    """a (…, in, r) and b (…, r, out), float32; b has the scale. x a b is what an adapter adds to a layer's output."""

    a: mx.array
    b: mx.array

    @property
    def rank(self) -> int:
        return int(self.a.shape[-1])


def reason_alone(wrappers: Wrappers) -> str | None:
    """Why rows of this adapter can't share a forward pass with others, or None where its update is a sum of factors."""
    for path, wrapper in wrappers.items():
        name = type(wrapper).__name__
        if not isinstance(wrapper, (LoRA, QALoRA, VeRA)) or isinstance(wrapper, DoRA):
            return f"{name} ({path}) isn't a sum of low-rank factors"
        if not isinstance(wrapper.base, ADAPTABLE):
            return f"{path} is a {type(wrapper.base).__name__}, which is computed for one adapter at a time"
        if isinstance(wrapper, QALoRA) and wrapper.rounds:
            return f"{name} ({path}) rounds its zero-points, so its update isn't a sum of low-rank factors"
        if isinstance(wrapper, VeRA) and wrapper.rank > MOST_VERA_RANK:
            return f"VeRA of rank {wrapper.rank}, above {MOST_VERA_RANK}, would take as much memory as many adapters"
    return None


def factors_of(wrapper: AdapterLayer) -> Factors:
    """The factors of a wrapper that `reason_alone` has nothing against."""
    if isinstance(wrapper, VeRA):
        a, b = wrapper.projections()
        return Factors(a * wrapper.vera_d[..., None, :], b.T * wrapper.vera_b[..., None, :])
    if isinstance(wrapper, QALoRA):  # the mean over a group of L inputs is a factor whose rows repeat, over L
        a, b = wrapper.masters()
        a = mx.repeat(a, wrapper.group_size, axis=-2) / wrapper.group_size
        return Factors(a, wrapper.scale * b)
    assert isinstance(wrapper, LoRA)
    a, b = wrapper.factors()
    if isinstance(wrapper.base, EXPERTS):
        a, b = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
    return Factors(a, wrapper.scale * b)


def rank_class(rank: int) -> int:
    """The smallest class that holds `rank`."""
    return max(LEAST_RANK, 1 << (rank - 1).bit_length())


class Stack:
    """The slots of one rank class. Slots move when it shrinks: `put` and `remove` say where adapters are."""

    def __init__(self, like: Factors):
        rank = rank_class(like.rank)
        self.rank = rank
        self._a = mx.zeros((2, *like.a.shape[:-1], rank))
        self._b = mx.zeros((2, *like.b.shape[:-2], rank, like.b.shape[-1]))
        self.slots: dict[Hashable, int] = {}

    def arrays(self, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """a and b in `dtype`, which is cast and kept when it is first asked for."""
        if self._a.dtype != dtype:
            self._a, self._b = self._a.astype(dtype), self._b.astype(dtype)
        return self._a, self._b

    @property
    def nbytes(self) -> int:
        return int(self._a.nbytes + self._b.nbytes)

    @property
    def capacity(self) -> int:
        """Slots, with slot 0."""
        return int(self._a.shape[0])

    @property
    def full(self) -> bool:
        return len(self.slots) + 1 == self.capacity

    def put(self, owner: Hashable, factors: Factors) -> None:
        """Copy an adapter's factors into a free slot."""
        if self.full:
            self._resize(range(self.capacity), 2 * self.capacity)
        slot = next(slot for slot in range(1, self.capacity) if slot not in self.slots.values())
        missing = self.rank - factors.rank
        a, b = factors.a.astype(self._a.dtype), factors.b.astype(self._b.dtype)
        if missing:
            leading = [(0, 0)] * (a.ndim - 2)
            a, b = mx.pad(a, [*leading, (0, 0), (0, missing)]), mx.pad(b, [*leading, (0, missing), (0, 0)])
        self._a[slot], self._b[slot] = a, b
        mx.eval(self._a, self._b)
        self.slots[owner] = slot

    def remove(self, owner: Hashable) -> None:
        """Free an adapter's slot, and memory where a quarter of the slots would do."""
        del self.slots[owner]
        needed = 1 << len(self.slots).bit_length()  # with slot 0
        if 4 * needed <= self.capacity:
            kept = list(self.slots.values())
            self.slots = {owner: slot for slot, owner in enumerate(self.slots, 1)}
            self._resize([0, *kept], max(needed, 2))

    def _resize(self, kept: Sequence[int], size: int) -> None:
        """A stack of `size` slots that begins with those of `kept`."""

        def resized(array: mx.array) -> mx.array:
            more = mx.zeros((size - len(kept), *array.shape[1:]), array.dtype)
            return mx.concatenate([array[mx.array(list(kept))], more])

        self._a = resized(self._a)
        mx.eval(self._a)
        self._b = resized(self._b)
        mx.eval(self._b)
