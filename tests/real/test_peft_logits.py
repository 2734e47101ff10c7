"""Adapters between PEFT and us: logits of base and adapter on both sides, torch on the CPU, both ways.

There: an adapter that PEFT made and saved, imported. Back: one of ours, exported and loaded by PEFT. The larger base is
SmolLM2 in float32; embeddings, which it ties, are on a tiny Llama, and experts on tiny random mixtures.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.adapters.attach import attach, put
from mlx_lora.config import Adapter
from mlx_lora.models.load import load
from mlx_lora.models.open import open_model
from mlx_lora.models.trunk.layers import layers_of
from mlx_lora.store import adapter as store
from mlx_lora.store import registry
from mlx_lora.tasks.export_adapter import export_adapter
from mlx_lora.tasks.import_adapter import import_adapter
from tests.conftest import write_tokenizer

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
        "LoraConfig",
        {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": LINEAR, "layers_to_transform": [0, 7, 29]},
        {"method": "dora", "rank": 4, "alpha": 8, "targets": "all-linear", "layers": [0, 7, 29]},
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


@dataclass
class Both:
    """One base in both programs, loaded once. What PEFT has wrapped is unwrapped again before it is used anew."""

    peers: SimpleNamespace
    path: Path
    theirs: Any

    def __post_init__(self) -> None:
        self.opened = open_model(self.path)
        self.ours = load(self.opened)

    def their_logits(self, model: Any) -> np.ndarray:
        with self.peers.torch.no_grad():
            logits: np.ndarray = model(self.peers.torch.tensor(TOKENS)).logits.numpy()
        return logits

    def our_logits(self, adapter: Path | None) -> np.ndarray:
        put(self.ours.model, store.wrappers_for(self.ours.model, store.read(adapter)) if adapter else {})
        logits = np.array(self.ours.model(mx.array(TOKENS)).astype(mx.float32))
        put(self.ours.model, {})
        return logits

    def made_by_peft(self, out: Path, kind: str, settings: dict[str, Any]) -> np.ndarray:
        """An adapter of PEFT's with random values, saved to `out`; its logits."""
        torch = self.peers.torch
        torch.manual_seed(1)
        config = getattr(self.peers.peft, kind)(task_type="CAUSAL_LM", **settings)
        model = self.peers.peft.get_peft_model(self.theirs, config).eval()
        with torch.no_grad():
            for name, array in model.named_parameters():
                if array.requires_grad:
                    amount = 0.3 if "vera" in name or "ia3" in name else 0.05
                    array += amount * torch.randn(array.shape) * (array.abs().mean() if "magnitude" in name else 1)
        model.save_pretrained(out)
        logits = self.their_logits(model)
        self.theirs = model.unload()
        return logits

    def loaded_by_peft(self, folder: Path) -> np.ndarray:
        """The logits of an adapter that PEFT reads from `folder`."""
        model = self.peers.peft.PeftModel.from_pretrained(self.theirs, folder).eval()
        logits = self.their_logits(model)
        self.theirs = model.unload()
        return logits

    def made_by_us(self, out: Path, settings: dict[str, Any]) -> np.ndarray:
        """An adapter of ours with random values, stored at `out`; its logits, as it is stored."""
        config = Adapter(**settings)
        wrappers = attach(self.ours.model, config, seed=1)
        for index, wrapper in enumerate(wrappers.values()):
            keys = mx.random.split(mx.random.key(index), 3)
            for key, name in zip(keys, wrapper.adapter_params(), strict=False):
                array = wrapper[name]
                amount = 0.05 * mx.abs(array).mean() if name == "m" else 0.3 if name.startswith("ve") else 0.05
                wrapper[name] = array + amount * mx.random.normal(array.shape, key=key)
        put(self.ours.model, {})
        manifest = store.Manifest(
            method=config.method, adapter=config.model_dump(), modules=list(wrappers),
            scales={name: wrapper.scale for name, wrapper in wrappers.items()}, base=registry.describe_base(self.ours),
        )  # fmt: skip
        store.save(out, wrappers, manifest, len(layers_of(self.ours.model)))
        return self.our_logits(out)


@pytest.fixture(scope="module")
def of_smollm2(peers: SimpleNamespace, smollm2: Path) -> Both:
    model = peers.transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=peers.torch.float32)
    return Both(peers, smollm2, model.eval())


def check_both_ways(both: Both, home: Path, kind: str, theirs: dict[str, Any], settings: dict[str, Any]) -> None:
    base = both.our_logits(None)
    assert np.abs(base - both.their_logits(both.theirs)).max() < TOLERANCE, "the bases differ"
    expected = both.made_by_peft(home / "peft", kind, theirs)
    imported = import_adapter(home / "peft", "imported", both.opened)
    assert np.abs(expected - base).max() > 0.1, "PEFT's adapter is too small to show anything"
    assert np.abs(both.our_logits(imported.path) - expected).max() < TOLERANCE, "imported"

    mine = home / "adapters" / "mine"
    expected = both.made_by_us(mine, settings)
    assert np.abs(expected - base).max() > 0.1, "our adapter is too small to show anything"
    export_adapter("mine", "peft", home / "exported", model=str(both.path))
    assert np.abs(both.loaded_by_peft(home / "exported") - expected).max() < TOLERANCE, "exported"
    again = import_adapter(home / "exported", "again", both.opened)
    check_same(mine, again.path, exact=settings.get("method", "lora") == "lora")


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
def test_logits_of_smollm2_are_equal_both_ways(case: str, of_smollm2: Both, home: Path) -> None:
    check_both_ways(of_smollm2, home, *CASES[case])


# ---- tiny random models: their files are transformers' own, so names and stacking are transformers' too ----

WIDTHS = {
    "vocab_size": 262, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 1}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": EXPERTS | {"norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}  # fmt: skip
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def tiny(peers: SimpleNamespace, path: Path, kind: str, **changes: Any) -> Both:
    """A random model as transformers saves it, large enough that its logits differ."""
    config = peers.transformers.AutoConfig.for_model(kind, **{**WIDTHS, **changes})
    peers.torch.manual_seed(0)
    model = peers.transformers.AutoModelForCausalLM.from_config(config, dtype=peers.torch.float32)
    with peers.torch.no_grad():
        for array in model.parameters():
            array += 0.1 * peers.torch.randn(array.shape)
    model.save_pretrained(path)
    file = path / "config.json"  # transformers 5 has other names for some keys that mlx_lm needs
    rope = {"rope_theta": config.rope_parameters["rope_theta"], "rope_scaling": {"rope_type": "default"}}
    file.write_text(json.dumps({**rope, **WIDTHS, **changes, **json.loads(file.read_text())}))
    if kind == "gpt_oss":  # mlx_lm reads its stacked experts from packed files alone, or from its own
        weights: Any = mx.load(str(path / "model.safetensors"))
        mx.save_safetensors(str(path / "model.safetensors"), dict(unstacked(weights)), {"format": "mlx"})
    write_tokenizer(path)
    return Both(peers, path, model.eval())


def unstacked(weights: dict[str, mx.array]) -> Iterator[tuple[str, mx.array]]:
    """gpt_oss as mlx_lm has it: gate and up apart, (experts, out, in)."""
    for name, array in weights.items():
        weight = ".bias" if name.endswith("_bias") else ".weight"
        plain = name.removesuffix("_bias")
        array = array.swapaxes(1, 2) if weight == ".weight" and ".experts." in name else array
        if plain.endswith("gate_up_proj"):
            yield plain.replace("gate_up_proj", "gate_proj") + weight, mx.contiguous(array[:, ::2])
            yield plain.replace("gate_up_proj", "up_proj") + weight, mx.contiguous(array[:, 1::2])
        else:
            yield (plain + weight, mx.contiguous(array)) if ".experts." in name else (name, array)


def test_logits_with_an_adapted_embedding_are_equal_both_ways(
    peers: SimpleNamespace, home: Path, tmp_path: Path
) -> None:
    targets = ["embed_tokens", "lm_head", "q_proj"]
    theirs = {"r": 4, "lora_alpha": 8, "target_modules": targets}
    both = tiny(peers, tmp_path / "llama", "llama")
    check_both_ways(both, home, "LoraConfig", theirs, {"rank": 4, "alpha": 8, "targets": targets})


@pytest.mark.parametrize("kind", MIXTURES)
def test_logits_of_mixtures_of_experts_are_equal_both_ways(
    kind: str, peers: SimpleNamespace, home: Path, tmp_path: Path
) -> None:
    both = tiny(peers, tmp_path / kind, kind, **MIXTURES[kind])
    parameters = [name.replace("mlp.", "block_sparse_moe.") if kind == "granitemoe" else name for name in PARAMETERS]
    theirs = {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "target_parameters": parameters,
        "rank_pattern": {f".*{parameters[1]}": 2},
    }  # fmt: skip
    settings = {"rank": 4, "alpha": 8, "targets": ["q_proj", "gate_proj", "up_proj", "down_proj"]}
    check_both_ways(both, home, "LoraConfig", theirs, settings)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_adapters_with_a_pair_for_each_expert_are_read_as_peft_reads_them(
    kind: str, peers: SimpleNamespace, home: Path, tmp_path: Path
) -> None:
    """Before transformers 5, experts were linear layers. PEFT still reads such adapters and stacks them, as we do."""
    both = tiny(peers, tmp_path / kind, kind, **MIXTURES[kind])
    block, parts = ("mlp", ("gate_proj", "up_proj", "down_proj"))
    if kind == "mixtral":
        block, parts = ("block_sparse_moe", ("w1", "w3", "w2"))
    width = 48 if kind == "qwen3_moe" else WIDTHS["intermediate_size"]
    random, arrays = np.random.default_rng(0), {}
    for layer, expert, part in itertools.product(range(2), range(4), parts):
        inputs, outputs = (width, 64) if part == parts[2] else (64, width)
        path = f"base_model.model.model.layers.{layer}.{block}.experts.{expert}.{part}"
        arrays[f"{path}.lora_A.weight"] = mx.array(random.normal(size=(3, inputs)).astype(np.float32) / 8)
        arrays[f"{path}.lora_B.weight"] = mx.array(random.normal(size=(outputs, 3)).astype(np.float32) / 8)
    folder = tmp_path / "older"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays, {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6, "target_modules": list(parts)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    imported = import_adapter(folder, "older", both.opened)
    expected = both.loaded_by_peft(folder)
    assert np.abs(expected - both.our_logits(None)).max() > 0.1
    assert np.abs(both.our_logits(imported.path) - expected).max() < TOLERANCE


def test_qalora_is_pefts_formula(peers: SimpleNamespace, home: Path, tmp_path: Path) -> None:
    """PEFT has QA-LoRA on GPTQ layers alone, which need a GPU; its formula runs on any linear layer."""
    from peft.tuners.lora.variants import QALoraLinearVariant

    both = tiny(peers, tmp_path / "llama", "llama")
    both.made_by_us(home / "adapters" / "mine", {"method": "qalora", "rank": 4, "alpha": 8, "targets": ["down_proj"]})
    export_adapter("mine", "peft", home / "peft", model=str(both.path))
    config = json.loads((home / "peft" / "adapter_config.json").read_text())
    tensors: Any = mx.load(str(home / "peft" / "adapter_model.safetensors"))
    path = "model.layers.1.mlp.down_proj"
    torch, x = peers.torch, np.random.default_rng(0).normal(size=(1, 5, WIDTHS["intermediate_size"])).astype(np.float32)
    weights = {
        name: SimpleNamespace(
            weight=torch.tensor(np.array(tensors[f"base_model.model.{path}.{name}.weight"].astype(mx.float32)))
        )
        for name in ("lora_A", "lora_B")
    }
    layer = SimpleNamespace(
        training=False, in_features=x.shape[-1], lora_dropout={"default": torch.nn.Identity()},
        scaling={"default": config["lora_alpha"] / config["r"]},
        qalora_group_size={"default": config["qalora_group_size"]},
        **{name: {"default": weight} for name, weight in weights.items()},
    )  # fmt: skip
    zero = torch.zeros(1, 5, WIDTHS["hidden_size"])
    expected = QALoraLinearVariant.forward(layer, "default", torch.tensor(x), zero).numpy()
    wrapper = store.wrappers_for(both.ours.model, store.read(home / "adapters" / "mine"))[path]
    found = np.array(wrapper(mx.array(x)) - wrapper.base(mx.array(x)))
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
