"""Fused models as transformers loads them: its logits beside base and adapter's own, for every architecture named."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.adapters.attach import build, put
from mlx_lora.config import Adapter
from mlx_lora.interop import hf
from mlx_lora.interop.fuse import fuse
from mlx_lora.models.load import load, load_stored
from mlx_lora.models.shapes import network
from mlx_lora.models.shards import write_shards
from mlx_lora.quant.quantize import named_arrays
from mlx_lora.store.adapter import Manifest, StoredAdapter, wrappers_for
from tests.adapters.zoo import COMMON as SMALL
from tests.adapters.zoo import GRANITE, MOE

pytestmark = pytest.mark.real
torch = pytest.importorskip("torch", reason="torch is not installed")

COMMON = {**SMALL, "vocab_size": 512}
GEMMA = {"query_pre_attn_scalar": 16, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}
# Six layers and this theta: mlx_lm has them by default, and reads them under other names than transformers writes.
TEXT = {"model_type": "gemma3_text", **COMMON, **GEMMA, "sliding_window": 16, "num_hidden_layers": 6, "rope_theta": 1e6}
UNTIED = {"tie_word_embeddings": False}
YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32,
    "llama_4_scaling_beta": 0.1, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.25, "layer_norm_eps": 1e-5},
    "cohere2": {"logit_scale": 0.25, "layer_norm_eps": 1e-5, "sliding_window": 16, "sliding_window_pattern": 2},
    "gemma": {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": {**GEMMA, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "sliding_window": 64},
    "gemma3_text": {**GEMMA, "sliding_window": 16, "sliding_window_pattern": 2},
    "gemma3": {},
    "granite": {**GRANITE},
    "llama": UNTIED,
    "ministral3": {**UNTIED, "rope_parameters": YARN},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": UNTIED,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "phi3": {"tie_word_embeddings": False, "pad_token_id": 0},
    "qwen2": {},
    "qwen2_moe": {**MOE, **UNTIED, "norm_topk_prob": False, "shared_expert_intermediate_size": 64},
    "qwen3": {},
    "qwen3_moe": {**MOE, "tie_word_embeddings": False},
    "smollm3": {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2, "pad_token_id": 0},
    "starcoder2": {"norm_epsilon": 1e-5, "use_bias": True, "sliding_window": None},
}  # fmt: skip
TOKENS = list(range(3, 43))


def test_every_architecture_named_is_compared_here() -> None:
    assert MODELS.keys() == {*hf.SAME, *hf.EXPERTS, *hf.PREFIXES}


def written(folder: Path, tokenizer: Path, name: str) -> Path:
    """A tiny random model of the architecture as mlx_lm writes one."""
    folder.mkdir()
    for file in tokenizer.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copyfile(file, folder / file.name)
    if name == "gemma3":
        return with_vision(folder)
    config = {"model_type": name} | COMMON | MODELS[name]
    mx.random.seed(0)
    arrays = [
        (path, 0.1 * mx.random.normal(array.shape) + ("norm" in path))
        for path, array in named_arrays(network(config, gpu=False))
    ]
    write_shards(folder, arrays, parameters=1)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_vision(folder: Path) -> Path:
    """A tiny Gemma 3 that sees, as transformers writes one."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    torch.manual_seed(0)
    tokens = {"image_token_index": 300, "boi_token_index": 301, "eoi_token_index": 302}
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=TEXT, vision_config=vision, mm_tokens_per_image=4, **tokens)
    )
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 512}))  # where mlx_lm looks for it
    return folder


def drawn(model: Any) -> StoredAdapter:
    """An adapter on every projection, with updates that change what the model says."""
    config = Adapter(rank=2, alpha=2, targets="all-linear")
    arrays = {}
    for index, (path, wrapper) in enumerate(build(model, config, seed=1).items()):
        b = 0.3 * mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(index))
        arrays |= {f"{path}.lora_a": wrapper.lora_a, f"{path}.lora_b": b}
    modules = sorted({name.rpartition(".")[0] for name in arrays})
    manifest = Manifest(method="lora", adapter=config.model_dump(), modules=modules, scales=dict.fromkeys(modules, 1.0))
    return StoredAdapter(Path("random"), manifest, arrays)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_says_what_base_and_adapter_say(name: str, tmp_path: Path, tiny_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = written(tmp_path / "source", tiny_path, name)
    loaded = load(source)
    adapter = drawn(loaded.model)
    base = np.array(loaded.model(mx.array([TOKENS]))[0])
    put(loaded.model, wrappers_for(loaded.model, adapter))
    ours = np.array(loaded.model(mx.array([TOKENS]))[0])
    fuse(partial(load_stored, source, lazily=True), adapter, tmp_path / "out", bits="16", renamed=hf.renamed)
    hf.as_one_of_several(tmp_path / "out")
    theirs_model, report = AutoModelForCausalLM.from_pretrained(
        str(tmp_path / "out"), dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    with torch.no_grad():
        theirs = theirs_model.eval()(torch.tensor([TOKENS])).logits[0].numpy()
    assert np.abs(base - ours).max() > 0.1
    assert np.abs(theirs - ours).max() < 1e-2 * max(np.abs(ours).max(), 1.0)
