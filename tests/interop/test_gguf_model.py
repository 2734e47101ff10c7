"""Merged GGUF models: values are base and update, formats llama.cpp's choices, and what has no place is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from mlx_lora.adapters.attach import Wrappers, build
from mlx_lora.config import Adapter
from mlx_lora.errors import CannotFuse, MlxLoraError, ModelError, NameTaken
from mlx_lora.interop.gguf import llama_types
from mlx_lora.interop.gguf.model import Merged, entries_of, kinds_for, write_model
from mlx_lora.interop.gguf.packed import exactly
from mlx_lora.interop.gguf.plan import plan_of
from mlx_lora.interop.gguf.tokenizer import tokenizer_fields
from mlx_lora.interop.gguf.types import TYPES, encoded, form_of, kind_of
from mlx_lora.interop.gguf.writing import written_beside
from mlx_lora.models.gguf import import_gguf
from mlx_lora.models.load import LoadedModel, load_stored
from mlx_lora.quant.quantize import dequantize_layer, named_arrays
from tests.interop.test_neutral import drawn
from tests.models.tiny_gguf import OWN, tiny_config, write_tiny

ROWS = 272


@pytest.fixture(scope="module", params=OWN)
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny random GGUF of an architecture, and the directory that it imports as."""
    folder = tmp_path_factory.mktemp("tiny")
    file = write_tiny(folder / "base.gguf", request.param)
    import_gguf(file, folder / "mlx", dtype="float32")
    return file, folder / "mlx"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    import_gguf(write_tiny(folder / "base.gguf", "llama"), folder / "mlx", dtype="float32")
    return folder / "mlx"


def opened(directory: Path, **settings: Any) -> tuple[LoadedModel, Wrappers]:
    base = load_stored(directory, lazily=True)
    return base, drawn(base.model, Adapter.model_validate(settings)) if settings else {}


def written(directory: Path, out: Path, form: str = "f32", **settings: Any) -> Merged:
    base, wrappers = opened(directory, **settings)
    fields = tokenizer_fields(base.tokenizer, ROWS)
    return write_model(base, wrappers, plan_of(base.config), form_of(form), fields, out)


def tensors(file: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def test_a_base_comes_out_as_it_came_in(imported: tuple[Path, Path], tmp_path: Path) -> None:
    """Every tensor bit for bit, but for norms of Gemma, from which 1 is taken and to which it is added again."""
    file, directory = imported
    written(directory, tmp_path / "out.gguf")
    before, after = tensors(file), tensors(tmp_path / "out.gguf")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.shape.tolist() == after[name].shape.tolist(), name
        np.testing.assert_allclose(after[name].data, tensor.data, rtol=0, atol=2e-7 * ("norm" in name), err_msg=name)
    fields = [gguf.GGUFReader(path).fields for path in (file, tmp_path / "out.gguf")]
    for name, field in fields[0].items():
        # transformers gives every Qwen 2 its own rule, whatever tokenizer.json says, and that is what is exported
        if not name.startswith(("GGUF.", "general.")) and name != "tokenizer.ggml.pre":
            assert fields[1][name].contents() == field.contents(), name


def test_a_merged_model_is_base_and_update(imported: tuple[Path, Path], tmp_path: Path) -> None:
    _, directory = imported
    merged = written(directory, tmp_path / "merged.gguf", targets="all-linear", rank=2, alpha=4)
    import_gguf(tmp_path / "merged.gguf", tmp_path / "back", dtype="float32")
    base, wrappers = opened(directory, targets="all-linear", rank=2, alpha=4)
    back = dict(named_arrays(load_stored(tmp_path / "back", lazily=True).model))
    for path, wrapper in wrappers.items():
        expected = np.array(wrapper.base["weight"] + wrapper.delta())
        np.testing.assert_allclose(np.array(back[f"{path}.weight"]), expected, atol=1e-6, err_msg=path)
    for name, array in named_arrays(base.model):
        if name.removesuffix(".weight") not in wrappers:
            np.testing.assert_allclose(np.array(back[name]), np.array(array), atol=1e-6, err_msg=name)
    assert merged.kept == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("method", ["dora", "vera", "ia3", "qalora", "adalora", "bitfit"])
def test_any_method_with_a_merged_form_is_merged(llama: Path, tmp_path: Path, method: str) -> None:
    written(llama, tmp_path / "a.gguf", method=method)
    written(llama, tmp_path / "b.gguf")
    one, other = tensors(tmp_path / "a.gguf"), tensors(tmp_path / "b.gguf")
    changed = [name for name in other if not np.array_equal(one[name].data, other[name].data)]
    assert changed or one.keys() - other.keys()


def test_formats_are_those_that_llama_cpp_would_choose(llama: Path, tmp_path: Path) -> None:
    base, _ = opened(llama)
    plan = plan_of(base.config)
    kinds = {entry.name: entry.kind for entry in entries_of(base.model, {}, plan, form_of("q4_1"))}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == Kind.Q4_1
    assert kinds["output.weight"] == Kind.Q8_0
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == Kind.F32
    tied = plan_of(tiny_config("llama") | {"model_type": "llama", "tie_word_embeddings": True})
    assert kind_of(tied.tensors["model.embed_tokens"][0], form_of("q4_0"), tied=True) == Kind.Q8_0
    odd = plan_of(tiny_config("llama") | {"model_type": "llama", "intermediate_size": 72})
    assert kind_of(odd.tensors["model.layers.0.mlp.down_proj"][0], form_of("q4_0"), tied=False) == Kind.F16
    fixed = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    moe = plan_of(tiny_config("qwen3moe") | {"model_type": "qwen3_moe", **fixed})
    assert kind_of(moe.tensors["model.layers.0.mlp.gate"][0], form_of("f16"), tied=False) == Kind.F32


@pytest.mark.parametrize("form", ["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_every_format_reads_back_within_its_step(llama: Path, tmp_path: Path, form: str) -> None:
    merged = written(llama, tmp_path / "a.gguf", form, targets="all-linear", rank=2, alpha=8)
    written(llama, tmp_path / "b.gguf", "f32", targets="all-linear", rank=2, alpha=8)
    one, other = (tensors(tmp_path / name)["blk.1.ffn_up.weight"] for name in ("a.gguf", "b.gguf"))
    values, exact = gguf.quants.dequantize(one.data, one.tensor_type), other.data
    steps = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127, "q5_1": 1 / 31, "q5_0": 1 / 15, "q4_1": 1 / 15}
    assert np.abs(values - exact).max() <= steps.get(form, 1 / 7) * np.abs(exact).max() * 1.1
    assert merged.kept == pytest.approx(1, abs=0.05)
    assert gguf.GGUFReader(tmp_path / "a.gguf").fields["general.file_type"].contents() == int(form_of(form).file_type)


def test_an_update_below_the_base_s_own_grid_is_seen_to_be_lost(llama: Path, tmp_path: Path) -> None:
    """A base of Q4_1 values, an update far under a step: requantizing gives the base again."""
    written(llama, tmp_path / "grid.gguf", "q4_1")
    import_gguf(tmp_path / "grid.gguf", tmp_path / "grid", dtype="float32")
    base, wrappers = opened(tmp_path / "grid", targets=["v_proj"], rank=2)
    for wrapper in wrappers.values():
        wrapper["lora_b"] = wrapper["lora_b"] * 1e-4
    fields = tokenizer_fields(base.tokenizer, ROWS)
    merged = write_model(base, wrappers, plan_of(base.config), form_of("q4_1"), fields, tmp_path / "out.gguf")
    assert merged.kept < 0.2
    base, wrappers = opened(tmp_path / "grid", targets=["v_proj"], rank=2)
    for wrapper in wrappers.values():
        wrapper["lora_b"] = wrapper["lora_b"] * 0.03
    plan = plan_of(base.config)
    kinds = kinds_for(base, dict(wrappers), plan, form_of("q4_1"))
    assert kinds == dict.fromkeys((f"blk.{layer}.attn_v.weight" for layer in range(2)), Kind.Q8_0)
    base = load_stored(tmp_path / "grid", lazily=True)
    again = drawn(base.model, Adapter.model_validate({"targets": ["v_proj"], "rank": 2}))
    for wrapper in again.values():
        wrapper["lora_b"] = wrapper["lora_b"] * 0.03
    merged = write_model(base, again, plan, form_of("q4_1"), fields, tmp_path / "out.gguf", kinds=kinds)
    assert merged.kept == pytest.approx(1, abs=0.1) and merged.kinds["Q8_0"] == 3


def test_packed_layers_that_nothing_is_merged_into_keep_their_bits(tmp_path: Path) -> None:
    """From Q4_1 to MLX's 4 bits and back, rows in their order; those that an adapter is on are quantized again."""
    file = write_tiny(tmp_path / "base.gguf", "llama", kind=lambda name: Kind.Q4_1)
    import_gguf(file, tmp_path / "mlx")
    written(tmp_path / "mlx", tmp_path / "out.gguf", "q4_1", targets=["v_proj"], rank=2)
    before, after = tensors(file), tensors(tmp_path / "out.gguf")
    for name, tensor in before.items():
        if tensor.tensor_type == Kind.Q4_1 and "attn_v" not in name and name != "output.weight":
            np.testing.assert_array_equal(after[name].data, tensor.data, name)
    assert not np.array_equal(after["blk.0.attn_v.weight"].data, before["blk.0.attn_v.weight"].data)


def test_groups_of_64_are_two_blocks_each() -> None:
    layer = nn.QuantizedLinear.from_linear(nn.Linear(128, 8, bias=False), 64, 4)
    layer.set_dtype(mx.float16)
    data = exactly(layer, Kind.Q4_1)
    assert data is not None
    expected = np.array(dequantize_layer(layer, mx.float32))
    np.testing.assert_allclose(gguf.quants.dequantize(data, Kind.Q4_1), expected, rtol=1e-6, atol=1e-7)
    layer["scales"] = layer["scales"].astype(mx.float32) * 1.0001
    assert exactly(layer, Kind.Q4_1) is None and exactly(layer, Kind.Q4_0) is None


def test_what_has_no_place_in_the_file_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    base = load_stored(llama, lazily=True)
    wrappers = build(base.model, Adapter.model_validate({"method": "bottleneck"}), seed=1)
    with pytest.raises(MlxLoraError, match="model.layers.0|no place|can't be merged|merged"):
        entries_of(base.model, wrappers, plan_of(base.config), form_of("f16"))
    base.model.extra = type(base.model.model.norm)(64)
    with pytest.raises(CannotFuse, match="no place for extra.weight"):
        entries_of(base.model, {}, plan_of(base.config), form_of("f16"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "cohere"}, "'cohere' has no GGUF form"),
        ({"rope_traditional": True}, "rope_traditional"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "known: linear, yarn, llama3"),
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}, "sliding attention"),
        ({"model_type": "qwen3_moe", **OWN["qwen3moe"], "decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
    ],
)
def test_what_an_architecture_cant_say_is_refused_by_name(changes: dict[str, Any], says: str) -> None:
    config = tiny_config("qwen3moe" if "decoder_sparse_step" in changes else "llama")
    with pytest.raises(ModelError, match=says):
        plan_of({"model_type": "llama", "mlp_only_layers": [], "norm_topk_prob": True, **config, **changes})


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_rope_scaling_imports_as_it_was_exported(llama: Path, tmp_path: Path, kind: str) -> None:
    scaling = {
        "linear": {"rope_type": "linear", "factor": 4.0},
        "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32.0,
                 "beta_slow": 1.0},
        "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 8192},
    }[kind]  # fmt: skip
    base, _ = opened(llama)
    plan = plan_of(base.config | {"rope_scaling": scaling})
    write_model(base, {}, plan, form_of("f32"), tokenizer_fields(base.tokenizer, ROWS), tmp_path / "a.gguf")
    import_gguf(tmp_path / "a.gguf", tmp_path / "out")
    assert load_stored(tmp_path / "out", lazily=True).config["rope_scaling"] == scaling


def test_values_beyond_a_format_are_refused() -> None:
    with pytest.raises(ModelError, match=r"blk.0: its values go beyond F16"):
        encoded("blk.0", np.full((2, 32), 1e6, np.float32), Kind.F16)
    with pytest.raises(ModelError, match="--type|not known"):
        form_of("q4_2")


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "folder" / "a.gguf"
    with pytest.raises(RuntimeError), written_beside(out) as beside:
        (beside / out.name).write_bytes(b"half")
        raise RuntimeError
    assert not list(out.parent.iterdir())
    for force in (False, True):
        with written_beside(out, force=force) as beside:
            (beside / out.name).write_bytes(str(force).encode())
    assert out.read_bytes() == b"True" and list(out.parent.iterdir()) == [out]
    with pytest.raises(NameTaken), written_beside(out):
        pass
    with pytest.raises(NameTaken, match="is a directory"), written_beside(tmp_path, force=True):
        pass


def test_formats_of_llama_cpp_need_llama_cpp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(llama_types, "PACKAGES", {})
    with pytest.raises(ModelError, match="no llama-quantize on PATH"):
        llama_types.check(form_of("q4_k_m"))
    llama_types.check(form_of("q4_1"))
    assert {"f16", "q4_k_m", "q6_k", "iq4_xs"} <= set(TYPES)


def test_the_program_on_path_is_asked_for_the_format(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "llama-quantize"
    program.write_text(
        '#!/bin/sh\nif [ "$3" = Q6_K ]; then echo "error: no such type" >&2; exit 1; fi\necho "$3" > "$2"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    llama_types.quantize(tmp_path / "in", tmp_path / "out", form_of("q4_k_m"))
    assert (tmp_path / "out").read_text() == "Q4_K_M\n"
    with pytest.raises(ModelError, match="can't make q6_k of it: error: no such type"):
        llama_types.quantize(tmp_path / "in", tmp_path / "other", form_of("q6_k"))


LIBRARY = """
#include <stdint.h>
#include <stdio.h>
struct settings { int32_t threads; int32_t type; int32_t output; char others[101]; void *last; };
struct settings llama_model_quantize_default_params(void) {
  struct settings s = {0}; s.output = 41; s.last = &s; return s;
}
void llama_backend_init(void) {}
uint32_t llama_model_quantize(const char *in, const char *out, const struct settings *s) {
  if (s->output != 41 || !s->last || s->threads < 1) return 2;
  FILE *file = fopen(out, "w"); fprintf(file, "%d", s->type); fclose(file); return 0;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_library_of_a_package_is_asked_for_the_format(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a library of ours, whose settings are larger than the two members known here."""
    package = tmp_path / "llama_cpp_py_sync"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "library.c").write_text(LIBRARY)
    subprocess.run(["cc", "-shared", "-fPIC", "library.c", "-o", "libllama.so"], check=True, cwd=package)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(llama_types, "PROGRAM", "no-such-program")
    llama_types.quantize(tmp_path / "in", tmp_path / "out", form_of("q4_k_m"))
    assert (tmp_path / "out").read_text() == str(int(form_of("q4_k_m").file_type))


def test_layers_are_freed_behind(llama: Path, tmp_path: Path) -> None:
    base, wrappers = opened(llama, targets="all-linear", rank=2)
    fields = tokenizer_fields(base.tokenizer, ROWS)
    write_model(base, wrappers, plan_of(base.config), form_of("f16"), fields, tmp_path / "out.gguf")
    assert not wrappers and sum(array.nbytes for _, array in named_arrays(base.model)) == 0
    mx.clear_cache()
