"""Adapters in memory: loaded when a request first names them, dropped when they are the ones used longest ago.

The store's directory is asked for every request, so a new adapter is there at once, and one that was replaced or
removed is too. Loading goes on between passes, a little at a time, so that rows of other adapters hardly wait. Rows
that run keep the version that they began with: an adapter that a row has is never dropped.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_lora.adapters.attach import Wrappers
from mlx_lora.adapters.mixed import Mixed
from mlx_lora.adapters.prompt import Prompt
from mlx_lora.adapters.stacks import reason_alone
from mlx_lora.data.read import sha256
from mlx_lora.data.virtual import Virtual
from mlx_lora.errors import AdapterError
from mlx_lora.models.load import LoadedModel
from mlx_lora.serve.conversation import trained
from mlx_lora.store import adapter as store
from mlx_lora.store import registry

Identity = tuple[object, ...]
Trial = Callable[[Mixed, Hashable, Wrappers], str | None]
# Seconds in which a directory that was set aside has been replaced by the new one.
REPLACING = 0.01


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


@dataclass(eq=False)
class Load:
    """An adapter on its way into memory: the version, the steps that are left, and what went wrong."""

    key: Hashable
    steps: Iterator[Held | None]
    digest: Future[str]
    error: Exception | None = None


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
    `on_gone` is called with the key of a version that was replaced or removed, `wake` from another thread when a file
    has been read and `load_on` can go on. `trial` says why an adapter can't share passes with others on this model,
    or None; it is asked for the first adapter that has a module.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        limit: int,
        find: Callable[[str], Path] = registry.find_by_name,
        on_gone: Callable[[Hashable], None] = lambda key: None,
        wake: Callable[[], None] = lambda: None,
        trial: Trial = lambda mixed, key, wrappers: None,
    ):
        self.loaded, self.limit, self.find, self.on_gone, self.wake = loaded, limit, find, on_gone, wake
        self.mixed = Mixed(loaded.model)
        self.trial = trial
        self._sound: set[str] = set()  # modules that have passed a trial
        self.held: OrderedDict[str, Held] = OrderedDict()  # the one used last at the end
        self._given: dict[str, Held] = {}
        self._retired: set[Held] = set()
        self._loads: dict[str, Load] = {}
        # reads files and computes their hashes, which takes longest; it never touches an array
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-adapters")

    @property
    def nbytes(self) -> int:
        """Bytes of all adapters: of the stacks with their free slots, and of those with a lane of their own."""
        own = [*self.held.values(), *self._retired]
        return self.mixed.nbytes + sum(held.nbytes for held in own if held.alone)

    def lease(self, name: str) -> Held | None:
        """The adapter of this name as it is on disk now, to be given back by `release`; None while it is being loaded.

        Raises AdapterError where it doesn't exist, is damaged, or belongs to another base.
        """
        held = self._given.get(name) or self._current(name)
        if held is None:
            return None
        if name in self.held:
            self.held.move_to_end(name)
        held.users += 1
        return held

    def _current(self, name: str) -> Held | None:
        try:
            path, key = self._version(name)
        except AdapterError:
            self.retire(name)
            raise
        held = self.held.get(name)
        if held is not None and held.key == key:
            return held
        load = self._loads.get(name)
        if load is None or load.key != key:
            digest = self._reader.submit(sha256, path / store.WEIGHTS)
            digest.add_done_callback(lambda _: self.wake())
            self._loads[name] = Load(key, self._loading(name, path, key, digest), digest)
        elif load.error is not None:
            if not isinstance(load.error, AdapterError):  # such as too little memory, which may be there next time
                del self._loads[name]
            raise load.error
        return None

    def _version(self, name: str) -> tuple[Path, Hashable]:
        """The directory of a name, and the key of the version that is there."""
        try:
            path = self.find(name)
            return path, (name, identity(path))
        except AdapterError:
            if name not in self.held and name not in self._loads:
                raise
        time.sleep(REPLACING)
        path = self.find(name)
        return path, (name, identity(path))

    @property
    def loading(self) -> bool:
        """Whether `load_on` has something to do now."""
        return any(load.digest.done() and load.error is None for load in self._loads.values())

    def awaits(self, name: str | None) -> bool:
        """Whether an adapter of this name is on its way, and hasn't failed."""
        load = None if name is None else self._loads.get(name)
        return load is not None and load.error is None

    def load_on(self, seconds: float) -> None:
        """Go on loading for about so many seconds: other rows wait that long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            load = next((one for one in self._loads.items() if one[1].digest.done() and not one[1].error), None)
            if load is None:
                return
            name, part = load
            try:
                held = next(part.steps)
            except Exception as error:
                part.error = error
                continue
            if held is not None:
                del self._loads[name]
                self.retire(name)
                self.held[name] = held

    def _loading(self, name: str, path: Path, key: Hashable, digest: Future[str]) -> Iterator[Held | None]:
        """Load an adapter in steps of at most some tens of milliseconds; the last one yields it."""
        stored = store.read(path, weights_sha256=digest.result())
        yield None
        registry.check_belongs(stored, self.loaded)
        end = trained(stored).format(self.loaded.tokenizer).own_end
        yield None
        wrappers = store.wrappers_for(self.loaded.model, stored)
        yield None
        yield from self._holding(name, key, wrappers, end)

    def give(self, name: str, wrappers: Wrappers, *, end: int | None = None) -> None:
        """Hold an adapter that isn't in the store, under a name that wins over the store's; it is never dropped."""
        for held in self._holding(name, (name, "given"), wrappers, end):
            if held is not None:
                self._given[name] = self.held[name] = held

    def _holding(self, name: str, key: Hashable, wrappers: Wrappers, end: int | None) -> Iterator[Held | None]:
        reason = reason_alone(wrappers)
        ends = frozenset() if end is None else frozenset({end})
        if reason is None:
            self._make_room(lambda: self.mixed.growth(wrappers))
            for _ in self.mixed.adding(key, wrappers):
                yield None
            if (reason := self._fault(key, wrappers)) is None:
                yield Held(name, key, None, ends=ends)
                return
        arrays = [array for wrapper in wrappers.values() for _, array in tree_flatten(wrapper.adapter_arrays())]
        nbytes = sum(array.nbytes for array in arrays)
        self._make_room(lambda: nbytes)
        mx.eval([wrapper.state for wrapper in wrappers.values()])
        yield Held(name, key, reason, wrappers, ends, _virtual(wrappers), nbytes)

    def _fault(self, key: Hashable, wrappers: Wrappers) -> str | None:
        """Why an adapter that is in the stacks can't share passes on this model, taken out then; None where it can."""
        if self._sound.issuperset(wrappers):
            return None
        if reason := self.trial(self.mixed, key, wrappers):
            self.mixed.remove(key)
        else:
            self._sound |= set(wrappers)
        return reason

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
        self._loads.pop(name, None)
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

    def close(self) -> None:
        self._reader.shutdown(wait=False, cancel_futures=True)

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
