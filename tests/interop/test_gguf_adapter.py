"""GGUF adapters: what is read back is what was written, in llama.cpp's layout; what can't be said is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mlx_lora.config import Adapter
from mlx_lora.errors import AdapterError
from mlx_lora.interop.gguf import adapter as codec
from mlx_lora.interop.gguf.plan import Plan, plan_of
from mlx_lora.interop.neutral import Neutral, expanded, from_wrappers
from mlx_lora.models.open import OpenModel
from tests.adapters.zoo import COMMON, MODELS, network
from tests.interop.test_neutral import drawn

BASES = ("llama", "llama untied", "qwen3", "gemma2 soft caps", "gemma3", "granite", "phi3 fused qkv", "qwen3 experts")


def config_of(base: str) -> dict[str, Any]:
    kind, changes = MODELS[base]
    config = {"model_type": kind} | COMMON | changes
    return config | ({} if base != "granite" else {"head_dim": None})


class Opened(OpenModel):
    """A model directory of which only the configuration is asked for."""

    def __init__(self, config: dict[str, Any]):
        super().__init__(Path("nowhere"))
        self.__dict__["config"] = config


def written(tmp_path: Path, base: str, **settings: Any) -> tuple[Neutral, Plan, Path]:
    neutral = from_wrappers(drawn(network(base), Adapter.model_validate({"targets": "all-linear", **settings})))
    plan = plan_of(config_of(base))
    return neutral, plan, codec.write_adapter(neutral, plan, tmp_path / "a.gguf")


@pytest.mark.parametrize("base", BASES)
def test_what_is_written_reads_back_bit_for_bit(tmp_path: Path, base: str) -> None:
    neutral, _, file = written(tmp_path, base, rank=2, alpha=8)
    again = codec.read_adapter(file, Opened(config_of(base)))
    assert again.modules.keys() == neutral.modules.keys()
    for path, module in neutral.modules.items():
        found = again.modules[path]
        np.testing.assert_array_equal(found.a, module.a)
        np.testing.assert_array_equal(found.b, module.b)
        assert (found.kind, found.scale) == (module.kind, module.scale)


def test_modules_with_other_ranks_and_alphas_keep_their_updates(tmp_path: Path) -> None:
    neutral, _, file = written(
        tmp_path, "llama untied", rank=4, rank_pattern={"k_proj": 2}, alpha_pattern={"v_proj": 3.5},
        targets=["k_proj", "v_proj", "q_proj", "embed_tokens", "lm_head"],
    )  # fmt: skip
    again = codec.read_adapter(file, Opened(config_of("llama untied")))
    for path, module in neutral.modules.items():
        found = again.modules[path]
        assert found.rank == module.rank
        expected = module.scale * (module.b @ module.a)
        np.testing.assert_allclose(found.scale * (found.b @ found.a), expected, rtol=0, atol=1e-6)


def test_the_file_is_as_llama_cpp_takes_it(tmp_path: Path) -> None:
    """Rows of B in pairs, the embedding's pair transposed, alpha in float32."""
    settings = {"targets": ["q_proj", "k_proj", "v_proj", "embed_tokens"], "rank": 2, "alpha": 8}
    neutral, plan, file = written(tmp_path, "llama untied", **settings)
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert fields["general.architecture"] == "llama" and fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora" and fields["adapter.lora.alpha"] == 8.0
    for name, heads in (("q", 4), ("k", 2)):
        b = neutral.modules[f"model.layers.1.self_attn.{name}_proj"].b
        pairs = b.reshape(heads, 2, 8, 2).swapaxes(1, 2).reshape(b.shape)
        np.testing.assert_array_equal(tensors[f"blk.1.attn_{name}.weight.lora_b"], pairs)
    np.testing.assert_array_equal(
        tensors["blk.1.attn_v.weight.lora_b"], neutral.modules["model.layers.1.self_attn.v_proj"].b
    )
    embedding = neutral.modules["model.embed_tokens"]
    np.testing.assert_array_equal(tensors["token_embd.weight.lora_a"], embedding.a.T)
    np.testing.assert_array_equal(tensors["token_embd.weight.lora_b"], embedding.b)


def test_qalora_becomes_lora_exactly(tmp_path: Path) -> None:
    neutral, _, file = written(tmp_path, "llama", method="qalora", rank=2)
    again = codec.read_adapter(file, Opened(config_of("llama")))
    for path, module in neutral.modules.items():
        np.testing.assert_array_equal(again.modules[path].a, expanded(module).a)
        np.testing.assert_array_equal(again.modules[path].b, module.b)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"method": "dora", "rank": 2}, "dora"),
        ({"method": "vera", "rank": 2}, "vera"),
        ({"method": "ia3"}, "ia3"),
        ({"targets": ["embed_tokens"], "rank": 2}, "model.embed_tokens: it is the output head too"),
    ],
)
def test_what_llama_cpp_has_no_adapter_for_is_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], names: str
) -> None:
    with pytest.raises(AdapterError, match=names):
        written(tmp_path, "llama", **settings)
    assert not list(tmp_path.iterdir())


def rewritten(file: Path, changes: dict[str, Any], arrays: dict[str, Any]) -> None:
    """The same file with other metadata and tensors; None leaves a tensor out."""
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")} | changes
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors} | arrays
    writer = gguf.GGUFWriter(file, fields.pop("general.architecture"))
    for key, value in fields.items():
        writer.add_float32(key, value) if isinstance(value, float) else writer.add_string(key, value)
    for name, array in tensors.items():
        if array is not None:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


Q = "blk.0.attn_q.weight"


@pytest.mark.parametrize(
    ("changes", "arrays", "says"),
    [
        ({"general.architecture": "qwen3"}, {}, "'qwen3', the base's is 'llama'"),
        ({"general.type": "model"}, {}, "not an adapter"),
        ({"adapter.type": "control"}, {}, "known: lora"),
        ({"adapter.lora.alpha": float("nan")}, {}, "adapter.lora.alpha is nan"),
        ({}, {f"{Q}.lora_a": None}, f"{Q} has one factor and not the other"),
        ({}, {f"{Q}.lora_b": np.zeros((64, 3), np.float32)}, f"{Q} has factors"),
        ({}, {f"{Q}.lora_b": np.full((64, 2), np.inf, np.float32)}, "NaN or infinity"),
        ({}, {"blk.7.attn_q.weight.lora_a": np.zeros((2, 64), np.float32)}, "blk.7.attn_q.weight.lora_a is unknown"),
    ],
)
def test_a_file_that_doesnt_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], arrays: dict[str, Any], says: str
) -> None:
    _, _, file = written(tmp_path, "llama", rank=2)
    rewritten(file, changes, arrays)
    with pytest.raises(AdapterError) as refused:
        codec.read_adapter(file, Opened(config_of("llama")))
    assert says in refused.value.message


def test_an_alpha_of_0_means_no_scaling(tmp_path: Path) -> None:
    neutral, plan, _ = written(tmp_path, "llama", rank=2, alpha=2)
    file = codec.write_adapter(neutral, plan, tmp_path / "b.gguf")
    rewritten(file, {"adapter.lora.alpha": 0.0}, {})
    assert {module.scale for module in codec.read_adapter(file, Opened(config_of("llama"))).modules.values()} == {1.0}


def test_a_module_of_another_model_is_refused(tmp_path: Path) -> None:
    neutral, plan, _ = written(tmp_path, "llama", rank=2)
    modules = {f"vision.{path}": replace(module) for path, module in neutral.modules.items()}
    with pytest.raises(AdapterError, match="vision.model.layers.0.self_attn.q_proj: llama.cpp has no adapter for it"):
        codec.check(Neutral("lora", modules), plan)
