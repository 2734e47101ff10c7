"""SmolLM2 with four adapters on all linears: sixteen requests at once get the texts that each gets by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_lora.config import Quantize
from mlx_lora.models.load import LoadedModel, load
from mlx_lora.models.unpack import unpack_once
from mlx_lora.serve.requests import Request, Sampling
from mlx_lora.serve.scheduler import Scheduler
from tests.serve.requests import assert_same_or_tied, by_itself, giving, prompt, random_adapter

pytestmark = pytest.mark.real
RANKS = {"a": 4, "b": 16, "c": 16, "d": 64}
MAKERS: dict[str, Any] = {
    name: lambda model, seed=seed, rank=rank: random_adapter(model, seed, size=0.02, rank=rank, targets="all-linear")
    for seed, (name, rank) in enumerate(RANKS.items(), 1)
}
SEEDED = Sampling(temperature=0.8, top_p=0.9, seed=5)


@pytest.mark.parametrize("bits", [None, 4])
def test_sixteen_requests_over_four_adapters_and_the_base(smollm2: Path, bits: int | None) -> None:
    def opened() -> LoadedModel:
        loaded = load(str(smollm2), quantization=Quantize(bits=bits, group_size=64) if bits else None)
        unpack_once(loaded)
        return loaded

    names = [None, *RANKS]
    asked = [
        Request(
            prompt(4 + 9 * index, index, most=40_000), names[index % 5], max_tokens=12,
            sampling=SEEDED if index % 4 == 3 else Sampling(),
        )
        for index in range(16)
    ]  # fmt: skip
    with Scheduler(opened, prepare=giving(MAKERS)) as running:
        answers = [running.submit(request) for request in asked]
        found = [answer.tokens() for answer in answers]
        status = running.status()
    assert status.way is not None and status.way.note is None
    assert status.passes < 60, "rows don't share passes"
    loaded = opened()
    for request, tokens in zip(asked, found, strict=True):
        wrappers = MAKERS[request.adapter](loaded.model) if request.adapter else {}
        own = by_itself(loaded.model, wrappers, request, loaded.tokenizer.eos_token_ids)
        if request.sampling.temperature:
            assert tokens == own
        else:
            assert_same_or_tied(loaded.model, wrappers, request, tokens, own)
