"""Hidden states come back exactly, from memory or from a file that nobody can find."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
import weakref
from collections import namedtuple
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.data.batch import collate
from mlx_lora.data.rows import Row
from mlx_lora.errors import TrainingError
from mlx_lora.train.prefix import PrefixStore, bytes_of, place

LENGTHS = [3, 7, 1, 4]
WIDTH = 5
GB = 10**9


def states(count: int, length: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal((count, length, WIDTH), key=mx.random.key(0)).astype(dtype)


@pytest.mark.parametrize("in_memory", [True, False], ids=["memory", "file"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_states_come_back_exactly_without_what_was_padding(dtype: mx.Dtype, in_memory: bool, tmp_path: Path) -> None:
    hidden = states(4, 8, dtype)
    with PrefixStore(LENGTHS, WIDTH, dtype, in_memory=in_memory, folder=tmp_path) as store:
        assert store.bytes == bytes_of(LENGTHS, WIDTH, dtype) == sum(LENGTHS) * WIDTH * dtype.size
        store.put([[2], [0]], hidden[:2])
        assert [index in store for index in range(4)] == [True, False, True, False]
        store.put([[1], [3]], hidden[2:])
        order = [3, 2, 1, 0]
        batch = store.batch([[index] for index in order], 16)
        assert (batch.shape, batch.dtype) == ((4, 16, WIDTH), dtype)
        for row, index, source in zip(batch, order, (3, 0, 2, 1), strict=True):
            assert mx.array_equal(row[: LENGTHS[index]], hidden[source, : LENGTHS[index]])
            assert not mx.any(row[LENGTHS[index] :])


def test_a_batch_fits_collated_rows() -> None:
    rows = [Row(np.arange(length + 1, dtype=np.int32), np.ones(length + 1, np.float32)) for length in LENGTHS]
    inputs = collate(rows).inputs
    with PrefixStore([len(row) - 1 for row in rows], WIDTH, mx.float32, in_memory=True) as store:
        store.put([[0], [1], [2], [3]], mx.repeat(mx.array(inputs, mx.float32)[..., None], WIDTH, axis=-1))
        np.testing.assert_array_equal(store.batch([[0], [1], [2], [3]], inputs.shape[1])[..., 0], inputs)


def test_wrong_rows_and_types_are_errors() -> None:
    with PrefixStore(LENGTHS, WIDTH, mx.float16, in_memory=True) as store:
        with pytest.raises(KeyError):
            store.batch([[0]], 8)
        with pytest.raises(ValueError, match="float32, the store holds .*float16"):
            store.put([[0]], states(1, 8))
        with pytest.raises(ValueError, match="shorter"):
            store.put([[0], [1]], states(1, 8, mx.float16))


@pytest.mark.parametrize("in_memory", [True, False], ids=["memory", "file"])
def test_closing_gives_everything_back(in_memory: bool, tmp_path: Path) -> None:
    store = PrefixStore(LENGTHS, WIDTH, mx.float32, in_memory=in_memory, folder=tmp_path)
    store.put([[0]], states(1, 8))
    kept = weakref.ref(store._states.base)
    store.close()
    assert kept() is None
    assert 0 not in store
    store.close()


@pytest.mark.real
def test_the_file_has_no_name_and_dies_with_the_process(tmp_path: Path) -> None:
    code = f"""if True:
        import os, pathlib, signal
        import mlx.core as mx
        from mlx_lora.train.prefix import PrefixStore
        store = PrefixStore([4], 3, mx.float32, in_memory=False, folder=pathlib.Path({str(tmp_path)!r}))
        store.put([[0]], mx.ones((1, 4, 3)))
        print(os.listdir({str(tmp_path)!r}), float(store.batch([[0]], 8).sum().item()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[] 12.0", -9), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fallocate", [True, False])
def test_the_file_is_private_and_all_of_it_is_allocated(
    fallocate: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fallocate:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    seen = []

    def remember(descriptor: int, size: int) -> mmap.mmap:
        seen.append(os.fstat(descriptor))
        return mapped(descriptor, size)

    mapped = mmap.mmap
    monkeypatch.setattr(mmap, "mmap", remember)
    with PrefixStore([300_000], WIDTH, mx.float32, in_memory=False, folder=tmp_path) as store:
        (file,) = seen
        assert (file.st_mode & 0o777, file.st_nlink, file.st_size) == (0o600, 0, store.bytes)
        assert file.st_blocks * 512 >= store.bytes


def test_a_disk_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free=100))
    with pytest.raises(TrainingError, match="hidden states take 300 B of disk, .* has 100 B") as error:
        PrefixStore(LENGTHS, WIDTH, mx.float32, in_memory=False, folder=tmp_path)
    assert error.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_is_an_error_not_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlx_lora.train.prefix._allocate", full)
    with pytest.raises(TrainingError, match="No space left on device"):
        PrefixStore(LENGTHS, WIDTH, mx.float32, in_memory=False, folder=tmp_path)


@pytest.mark.parametrize(
    ("needed", "memory", "disk", "where"),
    [
        (1 * GB, 1 * GB, 0, "memory"),
        (1 * GB + 1, 1 * GB, 3 * GB, "file"),
        (3 * GB, 0, 6 * GB, "file"),
        (3 * GB + 1, 1 * GB, 6 * GB, "the hidden states take 3 GB, too much for 1 GB of memory and 6 GB of disk"),
    ],
)
def test_memory_first_then_disk_and_never_most_of_it(needed: int, memory: int, disk: int, where: str) -> None:
    assert place(needed, memory, disk) == where
