"""Keys and values in fewer bits: nearly the same answers, less memory, and a refusal by name where it can't be."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mlx_lora.errors import ModelError
from mlx_lora.models.load import LoadedModel, load
from mlx_lora.serve import lookup, memory, worker
from mlx_lora.serve.quantized import QuantizedCaches
from mlx_lora.serve.requests import Request
from mlx_lora.serve.scheduler import Scheduler
from mlx_lora.serve.status import Options
from tests.conftest import write_model
from tests.models.tiny import mixed, plain
from tests.models.tiny.build import build
from tests.serve.requests import giving, prompt, random_adapter
from tests.serve.test_lookup import FREE, SURE, Told, repeating

CONFIGS = {**plain.CONFIGS, **mixed.CONFIGS}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose heads can be quantized: in groups of 32."""
    return write_model(tmp_path_factory.mktemp("wide") / "wide", head_dim=32)


def kept_bytes(path: Path, kv_bits: int | None) -> tuple[list[int], int]:
    """The answer to a prompt, and the bytes of its caches: 256 tokens, which is a step in which they grow."""
    with Scheduler(lambda: load(path), options=Options(lookup=False, kv_bits=kv_bits)) as running:
        answer = running.submit(Request(prompt(236), max_tokens=20)).tokens()
        return answer, running.status().prompt_cache_bytes


def test_the_caches_take_what_their_bits_say_and_plan_counts_them_so(wide: Path) -> None:
    (plainly, whole), (eight, half), (_, quarter) = (kept_bytes(wide, bits) for bits in (None, 8, 4))
    # 32 values share a scale and a bias: 8 bits are 10 in float32's 32, 4 bits are 6
    assert half / whole == pytest.approx(10 / 32, rel=0.01) and quarter / whole == pytest.approx(6 / 32, rel=0.01)
    assert eight[:4] == plainly[:4]
    model = load(wide).model
    for bits, part in ((8, 10 / 32), (4, 6 / 32)):
        planned = memory.row_bytes(model, 1000, QuantizedCaches(model, "llama", bits))
        assert planned / memory.row_bytes(model, 1000) == pytest.approx(part, rel=0.01)
    assert memory.plan(model, base=0, limit=1 << 30, kv_bits=8).rows == 1


def test_one_row_at_a_time_with_drafts_and_adapters(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts take tokens back out of quantized caches too, and a second turn goes on from them."""
    requests = [Request(repeating(14, seed), name, max_tokens=40) for seed, name in enumerate((None, "a", "a"))]
    longer = Request((*requests[0].tokens, 7, 8, 9), max_tokens=10)
    prepare = giving({"a": lambda model: random_adapter(model, 1, size=0.1, rank=4)})
    found = []
    monkeypatch.setattr(lookup, "START", SURE)
    monkeypatch.setattr(worker, "find_passes", lambda *_: Told(FREE))
    for drafts in (False, True):
        with Scheduler(lambda: load(wide), prepare=prepare, options=Options(drafts, 8)) as running:
            answers = [running.submit(request) for request in requests]
            found.append([answer.tokens() for answer in answers] + [running.submit(longer).tokens()])
            status = running.status()
            assert bool(status.held_tokens) == drafts and status.cached_tokens >= len(requests[0].tokens)
            assert status.way is not None and "caches have 8 bits" in str(status.way.note)
    assert found[0] == found[1]


@pytest.mark.parametrize("family", ["lfm2", "gpt_oss", "deepseek_v3", "mamba2"])
def test_caches_that_cant_be_quantized_are_refused_by_name(family: str) -> None:
    tokenizer: Any = SimpleNamespace(eos_token_ids={95})
    config = {"model_type": family}

    def opened() -> LoadedModel:
        return LoadedModel(build(family, CONFIGS[family]), tokenizer, config, Path(), mx.float32)

    with pytest.raises(ModelError, match=f"{family}: its caches can't be quantized") as refused:
        Scheduler(opened, options=Options(kv_bits=8)).start()
    assert refused.value.hint == "leave --kv-bits out"


def test_heads_of_another_size_and_other_bits_are_refused(tiny: LoadedModel) -> None:
    with pytest.raises(ModelError, match="heads have a size of 16, a multiple of 32 is needed"):
        QuantizedCaches(tiny.model, "llama", 8)
    with pytest.raises(ModelError, match="a cache of 3 bits isn't known; known: 8, 4"):
        QuantizedCaches(tiny.model, "llama", 3)
