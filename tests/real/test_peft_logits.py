"""Adapters between PEFT and us: logits of base and adapter on both sides, torch on the CPU, both ways.

There: an adapter that PEFT made and saved, imported. Back: one of ours, exported and loaded by PEFT. The larger base is
SmolLM2 in float32; embeddings, which it ties, are on a tiny Llama, and experts on tiny random mixtures.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.adapters.attach import attach, put
from mlx_lora.config import Adapter
from mlx_lora.models.load import load
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.store import adapter as store
from mlx_lora.store import registry
from mlx_lora.tasks.export_adapter import export_adapter
from mlx_lora.tasks.import_adapter import import_adapter

pytestmark = pytest.mark.real

TOKENS = [[5, 9, 70, 2, 33, 11, 8, 61, 40, 3]]
# Largest difference of a logit, in float32 on both sides.
TOLERANCE = 1e-3
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]

# name -> PEFT's configuration, and ours of the same kind
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "attention": ("LoraConfig", {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION}, {"rank": 4, "alpha": 8}),
    "all-linear": (
        "LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
        {"rank": 4, "alpha": 6, "targets": "all-linear"},
    ),
    "rslora": (
        "LoraConfig", {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": ATTENTION},
        {"rank": 8, "alpha": 16, "rslora": True},
    ),
    "patterns": (
        "LoraConfig",
        {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "rank_pattern": {"down_proj": 2, r"layers\.1\.*": 6},
         "alpha_pattern": {"self_attn.q_proj": 3}, "layers_to_transform": [0, 1, 2], "layers_pattern": "layers",
         "exclude_modules": ["v_proj"]},
        {"rank": 4, "alpha": 8, "rank_pattern": {"q_proj": 2, "v_proj": 8}, "alpha_pattern": {"k_proj": 3}},
    ),
    "regex": (
        "LoraConfig", {"r": 2, "lora_alpha": 4, "target_modules": r".*layers\.[02]\..*(q_proj|up_proj)"},
        {"rank": 3, "alpha": 5, "layers": [0, 2], "targets": ["q_proj", "up_proj"]},
    ),
    "dora": (
        "LoraConfig", {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": LINEAR},
        {"method": "dora", "rank": 4, "alpha": 8, "targets": "all-linear"},
    ),
    "vera": (
        "VeraConfig", {"r": 16, "target_modules": ["q_proj", "o_proj", "down_proj"]},
        {"method": "vera", "rank": 16, "targets": ["q_proj", "o_proj", "down_proj"]},
    ),
    "ia3": (
        "IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        {"method": "ia3"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def peers() -> SimpleNamespace:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        import torch
        import transformers
    transformers.logging.set_verbosity_error()
    return SimpleNamespace(torch=torch, peft=peft, transformers=transformers)


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """PEFT and transformers warn of what they leave to their own defaults; none of it is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def their_model(peers: SimpleNamespace, path: Path) -> Any:
    return peers.transformers.AutoModelForCausalLM.from_pretrained(path, dtype=peers.torch.float32).eval()


def their_logits(peers: SimpleNamespace, model: Any, tokens: list[list[int]]) -> np.ndarray:
    with peers.torch.no_grad():
        logits: np.ndarray = model(peers.torch.tensor(tokens)).logits.numpy()
    return logits


def our_logits(path: Path, adapter: Path | None, tokens: list[list[int]]) -> np.ndarray:
    loaded = load(path)
    if adapter is not None:
        put(loaded.model, store.wrappers_for(loaded.model, store.read(adapter)))
    return np.array(loaded.model(mx.array(tokens)).astype(mx.float32))


def made_by_peft(peers: SimpleNamespace, path: Path, out: Path, kind: str, settings: dict[str, Any]) -> np.ndarray:
    """An adapter of PEFT's with random values, saved to `out`; its logits."""
    torch = peers.torch
    torch.manual_seed(1)
    config = getattr(peers.peft, kind)(task_type="CAUSAL_LM", **settings)
    model = peers.peft.get_peft_model(their_model(peers, path), config).eval()
    with torch.no_grad():
        for name, array in model.named_parameters():
            if array.requires_grad:
                amount = 0.3 if "vera" in name or "ia3" in name else 0.05
                array += amount * torch.randn(array.shape) * (array.abs().mean() if "magnitude" in name else 1)
    model.save_pretrained(out)
    return their_logits(peers, model, TOKENS)


def ours(path: Path, out: Path, settings: dict[str, Any]) -> np.ndarray:
    """An adapter of ours with random values, stored at `out`; its logits, as it is stored."""
    loaded = load(path)
    config = Adapter(**settings)
    wrappers = attach(loaded.model, config, seed=1)
    for index, wrapper in enumerate(wrappers.values()):
        keys = mx.random.split(mx.random.key(index), 3)
        for key, name in zip(keys, wrapper.adapter_params(), strict=False):
            array = wrapper[name]
            amount = 0.05 * mx.abs(array).mean() if name == "m" else 0.3 if name.startswith(("v", "vera")) else 0.05
            wrapper[name] = array + amount * mx.random.normal(array.shape, key=key)
    manifest = store.Manifest(
        method=config.method, adapter=config.model_dump(), modules=list(wrappers),
        scales={name: wrapper.scale for name, wrapper in wrappers.items()}, base=registry.describe_base(loaded),
    )  # fmt: skip
    store.save(out, wrappers, manifest, len(layers_of(loaded.model)))
    return our_logits(path, out, TOKENS)


def check_both_ways(
    peers: SimpleNamespace, path: Path, home: Path, kind: str, theirs: dict[str, Any], settings: dict[str, Any]
) -> None:
    base = our_logits(path, None, TOKENS)
    expected = made_by_peft(peers, path, home / "peft", kind, theirs)
    imported = import_adapter(home / "peft", "imported", str(path))
    found = our_logits(path, imported.path, TOKENS)
    assert np.abs(expected - base).max() > 0.1, "PEFT's adapter is too small to show anything"
    assert np.abs(found - expected).max() < TOLERANCE, "imported"

    expected = ours(path, home / "adapters" / "mine", settings)
    assert np.abs(expected - base).max() > 0.1, "our adapter is too small to show anything"
    export_adapter("mine", "peft", home / "exported", model=str(path))
    model = peers.peft.PeftModel.from_pretrained(their_model(peers, path), home / "exported").eval()
    assert np.abs(their_logits(peers, model, TOKENS) - expected).max() < TOLERANCE, "exported"
    again = import_adapter(home / "exported", "again", str(path))
    check_same(home / "adapters" / "mine", again.path, exact=settings.get("method", "lora") == "lora")


def check_same(first: Path, second: Path, *, exact: bool) -> None:
    """What comes back is what went out: every array, in the last bit for LoRA, with the same rank and scale."""
    before, after = store.read(first), store.read(second)
    assert before.manifest.modules == after.manifest.modules
    for name, array in before.arrays.items():
        if exact:
            assert mx.array_equal(array, after.arrays[name]).item() and array.dtype == after.arrays[name].dtype, name
        else:
            np.testing.assert_array_equal(array.astype(mx.float32), after.arrays[name].astype(mx.float32), name)
    if exact:
        assert (before.rank, before.scale) == (after.rank, after.scale) and before.arrays.keys() == after.arrays.keys()


@pytest.mark.parametrize("case", CASES)
def test_logits_of_smollm2_are_equal_both_ways(case: str, peers: SimpleNamespace, smollm2: Path, home: Path) -> None:
    check_both_ways(peers, smollm2, home, *CASES[case])
