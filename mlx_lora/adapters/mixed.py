"""Many adapters on one model at once: every row of a forward pass has its own, or none.

    y[n] = W₀x[n] + x[n] A[s] B[s],  s the slot of row n's adapter

The base's product is one for all rows. The factors of all adapters lie in stacks (`adapters.stacks`) from which
`mx.gather_mm` takes those of each row, as in Punica (arXiv 2310.18547). The cost of a pass grows with its rows and
their ranks, not with the adapters that are held. Where all rows have one adapter, its factors are multiplied once.

Which adapter a row has is published for one pass. A pass without that raises: it would run on another row's adapter.
Methods whose update isn't a sum of factors can't join (`stacks.reason_alone`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.attach import Wrappers, put
from mlx_lora.adapters.base import AdapterLayer, by_kind, layer_shape
from mlx_lora.adapters.published import Pass, Share
from mlx_lora.adapters.stacks import Factors, Stack, factors_of, rank_class, reason_alone
from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError, CannotFuse
from mlx_lora.models.experts import noting_order

# Passes whose index arrays are kept: those of a running batch, and of the prompts beside it.
REMEMBERED = 16


class MixedLayer(AdapterLayer, abstract=True):
    """A module with the factors of every adapter that adapts it, in a stack for each rank class."""

    def __init__(self, layer: nn.Module, path: str, mixed: Mixed):
        super().__init__()
        self.layer = layer
        # in __dict__: neither parameters nor modules
        self.__dict__.update(path=path, mixed=mixed, stacks={})

    @staticmethod
    def from_base(layer: nn.Module, config: Adapter, *, path: str, key: Any, shared: Any = None) -> AdapterLayer:
        raise AdapterError("adapters are added to `Mixed`, which makes these wrappers")

    @property
    def base(self) -> nn.Module:
        return self["layer"]  # type: ignore[no-any-return]

    def adapter_params(self) -> tuple[str, ...]:
        return ()

    def delta(self) -> mx.array:
        raise CannotFuse("a layer with several adapters has no one update", hint="fuse one of them")

    @abstractmethod
    def __call__(self, *arguments: Any, **keywords: Any) -> mx.array: ...

    def put(self, key: Hashable, factors: Factors) -> None:
        """Hold an adapter's factors under its key."""
        rank = rank_class(factors.rank)
        if rank not in self.stacks:
            self.stacks[rank] = Stack(factors)
        self.stacks[rank].put(key, factors)

    def shares(self, rows: int) -> list[Share]:
        """The shares of the running pass in an input whose first axis has `rows` entries: rows, or all their tokens."""
        current: Pass | None = self.mixed.current
        if current is None:
            raise AdapterError(
                f"{self.path}: a forward pass without published rows; it would run on the adapter of another row"
            )
        if not self.stacks:
            return []
        known = current.shares.get((id(self), rows))
        if known is None:
            repeats = 1 if rows == len(current.keys) else current.tokens
            if rows != len(current.keys) * repeats:
                raise AdapterError(
                    f"{self.path}: {rows} rows enter for {len(current.keys)} published ones: this model mixes its rows"
                )
            keys = [key for key in current.keys for _ in range(repeats)]
            known = current.shares[id(self), rows] = [
                share for stack in self.stacks.values() if (share := self.mixed.share(stack, keys)) is not None
            ]
        return known

    def add(self, y: mx.array, x: mx.array, *, transposed: bool = False) -> mx.array:
        """y (N, …, out) plus each row's update of x (N, …, in); `transposed` for x Bᵀ Aᵀ."""
        for share in self.shares(x.shape[0]):
            a, b = share.stack.arrays(x.dtype)
            if transposed:
                a, b = b.swapaxes(-1, -2), a.swapaxes(-1, -2)
            rows = x.reshape(1 if share.single else x.shape[0], -1, x.shape[-1])
            z = mx.gather_mm(rows, a, lhs_indices=share.rows, rhs_indices=share.slots)
            y = _added(y, mx.gather_mm(z, b, rhs_indices=share.slots), share)
        return y

    def _extra_repr(self) -> str:
        return ", ".join(f"{len(stack.slots)} of rank {rank}" for rank, stack in self.stacks.items())


def _added(y: mx.array, update: mx.array, share: Share) -> mx.array:
    """y with the update of a share's rows."""
    if share.rows is None:
        return y + update.reshape(y.shape).astype(y.dtype)
    return y.at[share.rows].add(update.reshape(-1, *y.shape[1:]).astype(y.dtype))


class MixedLinear(MixedLayer):
    """x (B, …, in) -> (B, …, out), or (B·T, in) -> (B·T, out)."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.add(self.layer(x), x)


class MixedEmbedding(MixedLayer):
    """Tokens (B, T) -> (B, T, dim); also the output head when embeddings are tied."""

    def __call__(self, tokens: mx.array) -> mx.array:
        y = self.layer(tokens)
        for share in self.shares(tokens.shape[0]):
            a, b = share.stack.arrays(y.dtype)
            chosen = tokens if share.rows is None else tokens[share.rows]
            z = a[share.slots.reshape(-1, *[1] * (tokens.ndim - 1)), chosen]
            z = z.reshape(share.slots.size, -1, z.shape[-1])
            y = _added(y, mx.gather_mm(z, b, rhs_indices=share.slots), share)
        return y

    def as_linear(self, x: mx.array) -> mx.array:
        return self.add(self.layer.as_linear(x), x, transposed=True)


class MixedExperts(MixedLayer):
    """A SwitchLinear's call: x (B, T, 1, 1, in) and indices (B, T, k), or both sorted by expert and without rows."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = self.layer(x, indices, sorted_indices=sorted_indices)
        experts = layer_shape(self.layer)[0]
        current = self.mixed.current
        count = len(current.keys) if sorted_indices and current is not None else indices.shape[0]
        for share in self.shares(count):
            if sorted_indices:
                assert current is not None
                slots = share.every[current.row_of_sorted(indices.size)]
            else:
                slots = share.every.reshape(-1, *[1] * (indices.ndim - 1))
            a, b = (array.reshape(-1, *array.shape[2:]) for array in share.stack.arrays(x.dtype))
            places = slots * experts + indices.astype(slots.dtype)
            y = y + mx.gather_mm(mx.gather_mm(x, a, rhs_indices=places), b, rhs_indices=places)
        return y


class Mixed:
    """The adapters that are held on one model, by keys of the caller's choice."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.current: Pass | None = None
        self._layers: dict[int, MixedLayer] = {}  # by the base module's id: shared modules have several paths
        self.keys: set[Hashable] = set()
        self._passes: dict[tuple[tuple[Hashable | None, ...], int], Pass] = {}
        self._slots: dict[tuple[int, ...], mx.array] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all stacks, free slots included."""
        return sum(stack.nbytes for layer in self._layers.values() for stack in layer.stacks.values())

    @property
    def wrappers(self) -> Wrappers:
        return {layer.path: layer for layer in self._layers.values()}

    def install(self) -> None:
        """Put the wrappers into the model, in place of any other adapter."""
        put(self.model, self.wrappers)

    def add(self, key: Hashable, wrappers: Wrappers) -> None:
        """Copy an adapter's factors into the stacks. `install` it before its first row.

        Raises AdapterError for one that can't share a pass with others, and for a key that is taken.
        """
        for _ in self.adding(key, wrappers):
            pass

    def adding(self, key: Hashable, wrappers: Wrappers) -> Iterator[None]:
        """`add` in as many steps as there are modules, between which passes may run."""
        if key in self.keys:
            raise AdapterError(f"an adapter {key!r} is held already")
        if reason := reason_alone(wrappers):
            raise AdapterError(f"the adapter can't share a forward pass: {reason}")
        new: dict[int, MixedLayer] = {}
        try:
            for path, wrapper in wrappers.items():
                index = id(wrapper.base)
                layer = self._layers.get(index) or new.get(index)
                if layer is None:
                    kind = by_kind(wrapper.base, MixedLinear, MixedEmbedding, MixedExperts)
                    layer = new[index] = kind(wrapper.base, path, self)
                layer.put(key, factors_of(wrapper))
                yield
            self._layers |= new
            self.keys.add(key)
            self._passes, self._slots = {}, {}
        except BaseException:  # memory may be short: no part of an adapter stays
            self._take_out(key)
            raise

    def growth(self, wrappers: Wrappers) -> int:
        """Bytes by which the stacks would grow to hold one more adapter, none where each has a free slot."""
        total = 0
        for wrapper in wrappers.values():
            factors = factors_of(wrapper)
            layer = self._layers.get(id(wrapper.base))
            stack = layer.stacks.get(rank_class(factors.rank)) if layer else None
            if stack is None:
                total += 2 * (factors.a.nbytes + factors.b.nbytes) * rank_class(factors.rank) // factors.rank
            elif stack.full:
                total += stack.nbytes
        return int(total)

    def remove(self, key: Hashable) -> None:
        """Let an adapter go; no row of a running pass may have it."""
        self.keys.remove(key)
        self._take_out(key)

    def _take_out(self, key: Hashable) -> None:
        """Free an adapter's slots; others may move."""
        for layer in self._layers.values():
            for rank, stack in list(layer.stacks.items()):
                if key in stack.slots:
                    stack.remove(key)
                if not stack.slots:
                    del layer.stacks[rank]
        self._passes, self._slots = {}, {}

    @contextmanager
    def rows(self, keys: Sequence[Hashable | None], tokens: int) -> Iterator[None]:
        """Publish the adapter of each row, None for the base, for one forward pass of `tokens` tokens a row.

        Raises AdapterError for an adapter that isn't held.
        """
        if missing := [key for key in keys if key is not None and key not in self.keys]:
            raise AdapterError(f"no adapter {missing[0]!r} is held")
        index = (tuple(keys), tokens)
        if len(self._passes) > REMEMBERED:
            self._passes, self._slots = {}, {}
        self.current = self._passes.setdefault(index, Pass(*index))
        experts = any(isinstance(layer, MixedExperts) for layer in self._layers.values())
        try:
            with noting_order(self._note) if experts else nullcontext():
                yield
        finally:
            self.current.order, self.current = None, None

    def _note(self, order: mx.array) -> None:
        assert self.current is not None
        self.current.order = order

    def share(self, stack: Stack, keys: Sequence[Hashable | None]) -> Share | None:
        """The rows of `keys` that have an adapter in `stack`, or None where no row has."""
        every = tuple(stack.slots.get(key, 0) for key in keys)
        rows = tuple(row for row, slot in enumerate(every) if slot)
        if not rows:
            return None
        single = len(rows) == len(every) and len(set(every)) == 1
        slots = every[:1] if single else tuple(every[row] for row in rows)
        some = None if len(rows) == len(every) else self._indices(rows)
        return Share(stack, some, self._indices(slots), self._indices(every), single)

    def _indices(self, values: tuple[int, ...]) -> mx.array:
        """An index array, one for all layers."""
        if values not in self._slots:
            self._slots[values] = mx.array(values, mx.uint32)
        return self._slots[values]
