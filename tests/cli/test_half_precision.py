"""train, eval and fuse from the command line, of a model that is stored in half precision.

On a CPU it computes in float32; under `pytest --as-gpu`, and on a Mac, in the files' own dtype.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from tests.cli.conftest import Ran
from tests.cli.test_commands import stops
from tests.conftest import write_model

Run = Callable[..., Ran]
SETTINGS = ("train.batch_size=4", "train.learning_rate=0.01", "train.iters=10", "adapter.rank=4")


@pytest.fixture(params=[mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def half_path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_model(tmp_path / "half", dtype=request.param, hidden_size=32, num_hidden_layers=2)


def metrics(home: Path, name: str, event: str, key: str) -> list[float]:
    lines = [json.loads(line) for line in (home / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if line["event"] == event]


def written(home: Path, name: str) -> bytes:
    return (home / "adapters" / name / "adapters.safetensors").read_bytes()


def test_a_half_precision_model_learns_resumes_and_fuses(
    half_path: Path, data: Path, run: Run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("train", "--model", half_path, "--data", data, "--json", *SETTINGS)
    ran = run(*words, "--name", "whole")
    assert ran.code == 0, ran.err
    losses = metrics(home, "whole", "step", "loss")
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.1

    with monkeypatch.context() as patch:
        patch.setattr("mlx_lora.cli.train.StopSignal.__call__", lambda stop: stops(stop, home))
        assert run(*words, "--name", "mine").code == 130
    assert run("train", "--name", "mine", "--resume", "--json").json["iters"] == 10
    assert written(home, "mine") == written(home, "whole")

    scored = run("eval", "--model", half_path, "--adapter", "whole", "--data", data, "--json")
    base, adapted = (result["loss"] for result in scored.json["results"])
    assert adapted < base - 0.1
    fused = run(
        "fuse", "--model", half_path, "--adapter", "whole", "--out", tmp_path / "fused", "--data", data, "--json"
    )
    assert fused.json["delta_survival"] > 0.9 and fused.json["kl"] < 1e-3 and fused.json["top1_agreement"] > 0.9
    again = run("eval", "--model", tmp_path / "fused", "--data", data, "--json")
    assert again.json["results"][0]["loss"] == pytest.approx(adapted, rel=1e-2)
