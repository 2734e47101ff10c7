"""One process at a time may write an adapter and a run of one name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mlx_lora import paths
from mlx_lora.errors import NameTaken


def _file(name: str) -> Path:
    folder = paths.home() / ".locks"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / paths.check_name(name)


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the adapter and the run called `name`, against other processes; a dead process holds nothing.

    What a process that died while writing has left is cleared. Raises NameTaken where another process holds them.
    """
    lock = FileLock(_file(name), timeout=0, mode=0o600)
    try:
        lock.acquire()
    except Timeout:
        raise NameTaken(f"another process is training {name!r}", hint="wait for it, or --name another one") from None
    try:
        run = paths.room("runs", name)
        paths.clear_leftovers(run)
        unfinished = {run / leftover.name[1:-9] for leftover in run.glob(".*") if leftover.is_dir()}
        for target in (paths.room("adapters", name), *unfinished):
            paths.clear_leftovers(target)
        yield
    finally:
        lock.release()


def is_locked(name: str) -> bool:
    """Whether another process holds `name` at this moment."""
    if not _file(name).is_file():  # never held
        return False
    lock = FileLock(_file(name), timeout=0, mode=0o600)
    try:
        lock.acquire()
    except Timeout:
        return True
    lock.release()
    return False
