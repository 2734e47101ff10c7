"""Adapters in memory: loaded when a request first names them, dropped when they are the ones used longest ago.

The store's directory is asked for every request, so a new adapter is there at once, and one that was replaced or
removed is too. Rows that run keep the version that they began with: an adapter that a row has is never dropped.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import Wrappers
from mlx_lora.adapters.mixed import Mixed
from mlx_lora.adapters.prompt import Prompt
from mlx_lora.adapters.stacks import reason_alone
from mlx_lora.data.virtual import Virtual
from mlx_lora.errors import AdapterError
from mlx_lora.models.load import LoadedModel
from mlx_lora.serve.conversation import trained
from mlx_lora.store import adapter as store
from mlx_lora.store import registry

Identity = tuple[object, ...]


@dataclass(eq=False)
class Held:
    """An adapter in memory. `alone` is why its rows can't join others, None where they can; then `wrappers` is empty.

    `key` names its version; `ends` are tokens that end its answers beside the tokenizer's; `users` are rows that have
    it.
    """

    name: str
    key: Hashable
    alone: str | None
    wrappers: Wrappers = field(default_factory=dict)
    ends: frozenset[int] = frozenset()
    virtual: Virtual | None = None
    nbytes: int = 0
    users: int = 0


def identity(path: Path) -> Identity:
    """What tells a version of an adapter from another one in its place: times, sizes and inodes of its files."""
    try:
        found = [(path / name).stat() for name in (store.WEIGHTS, store.CONFIG)]
        found += [(path / store.MANIFEST).stat()] if (path / store.MANIFEST).exists() else []
    except OSError:
        raise AdapterError(f"{path.name}: the adapter is being replaced or removed", hint="try again") from None
    return tuple((entry.st_mtime_ns, entry.st_size, entry.st_ino) for entry in found)


class Residence:
    """At most `limit` bytes of adapters on one loaded base, but for those in use. For the thread that owns MLX.

    `find` gives the directory of a name and raises AdapterError for one that isn't there; any thread may call it.
    `on_gone` is called with the key of a version that was replaced or removed.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        limit: int,
        find: Callable[[str], Path] = registry.find_by_name,
        on_gone: Callable[[Hashable], None] = lambda key: None,
    ):
        self.loaded, self.limit, self.find, self.on_gone = loaded, limit, find, on_gone
        self.mixed = Mixed(loaded.model)
        self.held: OrderedDict[str, Held] = OrderedDict()  # the one used last at the end
        self._given: dict[str, Held] = {}
        self._retired: set[Held] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of all adapters: of the stacks with their free slots, and of those with a lane of their own."""
        own = [*self.held.values(), *self._retired]
        return self.mixed.nbytes + sum(held.nbytes for held in own if held.alone)

    def lease(self, name: str) -> Held:
        """The adapter of this name as it is on disk now, loaded if it isn't in memory; `release` it after its row.

        Raises AdapterError where it doesn't exist, is damaged, or belongs to another base.
        """
        held = self._given.get(name) or self._current(name)
        if name in self.held:
            self.held.move_to_end(name)
        held.users += 1
        return held

    def _current(self, name: str) -> Held:
        try:
            path = self.find(name)
        except AdapterError:
            self.retire(name)
            raise
        key = (name, identity(path))
        held = self.held.get(name)
        if held is not None and held.key == key:
            return held
        loaded = self._read(name, path, key)
        self.retire(name)
        self.held[name] = loaded
        return loaded

    def _read(self, name: str, path: Path, key: Hashable) -> Held:
        stored = store.read(path)
        registry.check_belongs(stored, self.loaded)
        end = trained(stored).format(self.loaded.tokenizer).own_end
        return self._hold(name, key, store.wrappers_for(self.loaded.model, stored), end)

    def give(self, name: str, wrappers: Wrappers, *, end: int | None = None) -> None:
        """Hold an adapter that isn't in the store, under a name that wins over the store's; it is never dropped."""
        self._given[name] = self.held[name] = self._hold(name, (name, "given"), wrappers, end)

    def _hold(self, name: str, key: Hashable, wrappers: Wrappers, end: int | None) -> Held:
        reason = reason_alone(wrappers)
        ends = frozenset() if end is None else frozenset({end})
        if reason is None:
            self._make_room(lambda: self.mixed.growth(wrappers))
            self.mixed.add(key, wrappers)
            return Held(name, key, None, ends=ends)
        arrays = [array for wrapper in wrappers.values() for _, array in tree_flatten(wrapper.adapter_arrays())]
        nbytes = sum(array.nbytes for array in arrays)
        self._make_room(lambda: nbytes)
        mx.eval([wrapper.state for wrapper in wrappers.values()])
        return Held(name, key, reason, wrappers, ends, _virtual(wrappers), nbytes)

    def _make_room(self, needed: Callable[[], int]) -> None:
        """Drop adapters that no row has, the ones used longest ago first, while `needed()` more bytes don't fit.

        A dropped adapter may leave its slots to the new one, which then needs no more bytes.
        """
        for name, held in list(self.held.items()):
            if self.nbytes + needed() <= self.limit:
                return
            if not held.users and name not in self._given:
                del self.held[name]
                self._drop(held)

    def release(self, held: Held) -> None:
        """A row with this adapter has ended."""
        held.users -= 1
        if not held.users and held in self._retired:
            self._retired.remove(held)
            self._drop(held)
        self._make_room(lambda: 0)

    def retire(self, name: str) -> None:
        """Let an adapter go that was replaced or removed: now, or when its last row ends."""
        held = self.held.pop(name, None)
        self._given.pop(name, None)
        if held is None:
            return
        self.on_gone(held.key)
        if held.users:
            self._retired.add(held)
        else:
            self._drop(held)

    def _drop(self, held: Held) -> None:
        if held.alone is None:
            self.mixed.remove(held.key)
        held.wrappers = {}

    def is_current(self, held: Held) -> bool:
        """Whether this version is the one that a new request would get."""
        return self.held.get(held.name) is held

    def names(self) -> list[str]:
        """Names of the adapters in memory, the one used last at the end."""
        return list(self.held)

    def why_alone(self) -> dict[str, str]:
        """Why rows of an adapter have batches of their own, by name."""
        return {name: held.alone for name, held in self.held.items() if held.alone}


def _virtual(wrappers: Wrappers) -> Virtual | None:
    prompts: list[Any] = [wrapper for wrapper in wrappers.values() if isinstance(wrapper, Prompt)]
    return next((Virtual(prompt.soft.shape[0], prompt.position) for prompt in prompts), None)
