"""The numbers of a run as TensorBoard's events."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from mlx_lora.errors import MlxLoraError
from mlx_lora.report.tensorboard import tensorboard
from mlx_lora.train.events import Evaluated, Note, Step


def step(number: int, loss: float, **others: bool) -> Step:
    return Step(number, 3, loss, 1e-3, 0.5, 64, 900.0, 1 << 20, **others)


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """What the one file of `folder` holds: records of a length, its checksum, an event, its checksum."""
    (file,) = folder.iterdir()
    bytes_, found = file.read_bytes(), []
    while bytes_:
        (length,) = struct.unpack_from("<Q", bytes_)
        event = Event.FromString(bytes_[12 : 12 + length])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        bytes_ = bytes_[16 + length :]
    return found


def test_every_finite_number_is_written_at_its_step_and_no_text(tmp_path: Path) -> None:
    with tensorboard(tmp_path / "events") as hear:
        for event in (
            Evaluated(0, 4.0, False), Note("a secret"), step(1, 3.5), step(2, float("nan"), skipped=True),
            Evaluated(2, 3.0, True, drift=0.25),
        ):  # fmt: skip
            hear(event)
    found = scalars(tmp_path / "events")
    assert ("validation/loss", 0, 4.0) in found and ("validation/drift", 2, 0.25) in found
    assert [entry for entry in found if entry[0] == "train/loss"] == [("train/loss", 1, 3.5)]
    assert ("memory/peak_bytes", 2, float(1 << 20)) in found
    (file,) = (tmp_path / "events").iterdir()
    assert b"secret" not in file.read_bytes()


def test_what_hinders_it_is_said_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MlxLoraError, match="file"), tensorboard(tmp_path / "file"):
        pass
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(MlxLoraError, match="needs? tensorboardX"), tensorboard(tmp_path):
        pass
