"""Sixteen prompts of different lengths over four adapters and the base, on a tiny model of each family.

Each gets the text that it gets by itself, greedy and sampled. Hybrids, latent attention, windows, experts and states
are among the families, and those that mlx_lm can't run in batches. A few run by default, the others are `real`.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_lora.adapters.attach import Wrappers
from mlx_lora.models.load import LoadedModel
from mlx_lora.serve.requests import Request, Sampling
from mlx_lora.serve.scheduler import Limits, Scheduler
from mlx_lora.serve.ways import ALONE, TOGETHER
from tests.models.tiny import mixed, plain
from tests.models.tiny.build import build
from tests.serve.requests import assert_same_or_tied, by_itself, giving, prompt, random_adapter

CONFIGS = {**plain.CONFIGS, **mixed.CONFIGS}
QUICK = ("llama", "lfm2", "nemotron_h", "gemma2")
REAL = (
    "gemma3_text", "gemma3n", "gpt_oss", "qwen3_moe", "deepseek_v3", "kimi_linear", "qwen3_5", "qwen3_next",
    "granitemoehybrid", "mamba2", "rwkv7", "llama4", "falcon_h1", "glm4_moe_lite", "bailing_moe_linear",
    "dbrx",
)  # fmt: skip
# What mlx_lm can't do for them: prompts aren't read together, or rows not run together.
ONE_BY_ONE = ("nemotron_h", "rwkv7", "bailing_moe_linear")
NEVER_TOGETHER = ("llama4", "gemma2")
# Its experts see the tokens that chose them, not rows: adapters have passes of their own.
APART = ("dbrx",)
END = 95
SEEDED = Sampling(temperature=0.9, top_p=0.95, seed=11)


def adapters(model: nn.Module) -> dict[str | None, Wrappers]:
    return {
        None: {},
        "a": random_adapter(model, 1, size=0.2, rank=4),
        "b": random_adapter(model, 2, size=0.1, rank=8, targets="all-linear"),
        "c": random_adapter(model, 3, size=0.2, rank=2, targets="all-linear", layers=1),
        "d": random_adapter(model, 4, size=0.2, rank=16, method="adalora"),
    }


def opened(family: str) -> LoadedModel:
    tokenizer = SimpleNamespace(eos_token_ids={END})
    return LoadedModel(build(family, CONFIGS[family]), tokenizer, {"model_type": family}, Path(), mx.float32)


def requests() -> list[Request]:
    """One prompt is longer than a chunk, and one is a single token."""
    names = [None, "a", "b", "c", "d"]
    lengths = [5, 150, 1, 17, 33, 4, 9, 21, 2, 40, 13, 6, 28, 3, 11, 19]
    settings = [Sampling(), Sampling(), SEEDED]
    return [
        Request(prompt(length, index), names[index % 5], max_tokens=6 + index % 4, sampling=settings[index % 3])
        for index, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(name, marks=pytest.mark.real) for name in REAL)])
def test_each_row_gets_the_text_that_it_gets_by_itself(family: str) -> None:
    makers: dict[str, Any] = {name: lambda model, name=name: adapters(model)[name] for name in "abcd"}
    with Scheduler(lambda: opened(family), limits=Limits(), prepare=giving(makers)) as running:
        asked = requests()
        answers = [running.submit(request) for request in asked]
        found = [answer.tokens() for answer in answers]
        status = running.status()
    assert status.way is not None
    assert status.way.rows == (ALONE if family in NEVER_TOGETHER else TOGETHER)
    assert (status.way.prompts == 1) == (family in ONE_BY_ONE + NEVER_TOGETHER)
    assert (status.way.note is None) == (status.way.prompts > 1)
    assert status.way.note is None or status.way.note.startswith(f"{family}: ")
    assert ("mixes its rows" in dict(status.alone).get("b", "")) == (family in APART)
    if status.way.prompts > 1 and family not in APART:  # each of 16 rows alone would take at least 7 passes
        assert status.passes < 60
    model = opened(family).model
    for request, tokens in zip(asked, found, strict=True):
        wrappers = adapters(model)[request.adapter]
        own = by_itself(model, wrappers, request, [END])
        if request.sampling.temperature:
            assert tokens == own, request
        else:
            assert_same_or_tied(model, wrappers, request, tokens, own)
