"""An adapter on disk: what is written is what is read, here and by mlx_lm, and nothing damaged gets through."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from mlx_lora.adapters.attach import attach, attached, put
from mlx_lora.config import Adapter, Quantize
from mlx_lora.errors import AdapterError, NameTaken
from mlx_lora.models.load import LoadedModel, load, load_stored
from mlx_lora.models.save import save as save_model
from mlx_lora.quant.quantize import quantize
from mlx_lora.store.adapter import CONFIG, MANIFEST, WEIGHTS, Manifest, read, read_manifest, save, wrappers_for
from tests.adapters.zoo import network
from tests.conftest import write_model

TOKENS = mx.array([[5, 9, 70, 2, 33, 11, 8]])


def trained(loaded: LoadedModel, **settings: Any) -> tuple[dict[str, Any], Manifest]:
    """An attached adapter that does something, and its manifest as training writes it."""
    config = Adapter(**settings)
    wrappers = attach(loaded.model, config, seed=1)
    for index, wrapper in enumerate(wrappers.values()):
        wrapper.lora_b = 0.2 * mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(index))
    scales = {path: wrapper.scale for path, wrapper in wrappers.items()}
    return wrappers, Manifest(method="lora", adapter=config.model_dump(), modules=list(wrappers), scales=scales)


@pytest.fixture
def written(tiny: LoadedModel, tmp_path: Path) -> Path:
    wrappers, manifest = trained(tiny, rank=4)
    return save(tmp_path / "adapter", wrappers, manifest, layers=3)


SETTINGS: dict[str, dict[str, Any]] = {
    "attention": {"rank": 4},
    "all-linear, rslora": {"rank": 4, "targets": "all-linear", "rslora": True},
    "embedding": {"rank": 4, "targets": ["embed_tokens", "v_proj"]},
    "rank pattern": {"rank": 4, "rank_pattern": {"q_proj": 2, "v_proj": 8}},
    "alpha pattern": {"rank": 4, "alpha_pattern": {"q_proj": 3, r"layers\.1.*v_proj": 50}},
    "both": {"rank": 2, "rslora": True, "rank_pattern": {"k_proj": 8}, "alpha_pattern": {"o_proj": 5}},
}


@pytest.mark.parametrize("bits", [None, 3, 4], ids=["plain", "3 bits", "4 bits"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_mlx_lm_and_we_read_what_was_written_with_the_same_logits(
    tmp_path: Path, settings: str, bits: int | None
) -> None:
    """Ranks and scales of single modules survive, by zero-padding and by folding into lora_b."""
    base = write_model(tmp_path / "base")
    if bits:
        save_model(load_stored(base, quantization=Quantize(bits=bits, group_size=32)), tmp_path / "packed")
        base = tmp_path / "packed"
    loaded = load(base)
    wrappers, manifest = trained(loaded, **SETTINGS[settings])
    expected = np.array(loaded.model(TOKENS))
    path = save(tmp_path / "adapter", wrappers, manifest, layers=3)

    put(loaded.model, wrappers_for(loaded.model, read(path)))
    ours = np.array(loaded.model(TOKENS))
    model, _ = mlx_lm.utils.load(str(base), adapter_path=str(path))
    model.set_dtype(mx.float32)  # mlx_lm multiplies an embedding's factors in their own bf16
    theirs = np.array(model(TOKENS))
    spread = np.abs(expected).max()
    np.testing.assert_allclose(ours, expected, atol=0.02 * spread, err_msg="further off than bf16 rounding")
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4 * spread)
    assert [wrapper.rank for wrapper in attached(loaded.model).values()] == [w.rank for w in wrappers.values()]


@pytest.mark.parametrize("bits", [None, 4], ids=["plain", "4 bits"])
def test_adapted_experts_read_in_mlx_lm_with_the_same_logits(tmp_path: Path, bits: int | None) -> None:
    ours, theirs = network("qwen3 experts"), network("qwen3 experts")
    for model in (ours, theirs):
        if bits:
            quantize(model, {"mode": "affine", "bits": bits, "group_size": 32})
    settings = Adapter(rank=2, targets="all-linear", rank_pattern={"up_proj": 4}, alpha_pattern={"down_proj": 3})
    wrappers = attach(ours, settings)
    for index, wrapper in enumerate(wrappers.values()):
        wrapper.lora_b = 0.2 * mx.random.normal(wrapper.lora_b.shape, key=mx.random.key(index))
    scales = {path: wrapper.scale for path, wrapper in wrappers.items()}
    manifest = Manifest(method="lora", adapter=settings.model_dump(), modules=list(wrappers), scales=scales)
    path = save(tmp_path / "adapter", wrappers, manifest, layers=2)
    put(ours, wrappers_for(ours, read(path)))
    load_adapters(theirs, str(path))
    theirs.set_dtype(mx.float32)
    theirs.eval()
    np.testing.assert_allclose(ours(TOKENS), theirs(TOKENS), rtol=1e-3, atol=1e-3)


def test_arrays_come_back_bit_for_bit_after_the_one_rounding(tiny: LoadedModel, tmp_path: Path) -> None:
    wrappers, manifest = trained(tiny, rank=4, rank_pattern={"v_proj": 2})
    first = save(tmp_path / "first", wrappers, manifest, layers=3)
    again = wrappers_for(tiny.model, read(first))
    for path, wrapper in wrappers.items():
        np.testing.assert_array_equal(again[path].lora_a, wrapper.lora_a.astype(mx.bfloat16).astype(mx.float32))
    second = save(tmp_path / "second", again, manifest, layers=3)
    assert (first / WEIGHTS).read_bytes() == (second / WEIGHTS).read_bytes()
    assert not any(tree_flatten(wrapper.trainable_parameters()) for wrapper in again.values())


def test_files_are_mlx_lms_and_the_manifest_says_what_is_in_them(written: Path) -> None:
    """No data in it; Ollama reads `alpha` and takes a missing one for 0."""
    assert sorted(file.name for file in written.iterdir()) == sorted([WEIGHTS, CONFIG, MANIFEST])
    config = json.loads((written / CONFIG).read_text())
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == 3 and config["alpha"] == 16
    assert config["lora_parameters"] | {"keys": None} == {
        "rank": 4, "scale": 4.0, "alpha": 16, "dropout": 0.0, "keys": None,
    }  # fmt: skip
    arrays = read(written).arrays
    assert {array.dtype for array in arrays.values()} == {mx.bfloat16}
    manifest = read_manifest(written)
    assert len(manifest.weights_sha256) == 64 and manifest.created and manifest.schema_version == 1


@pytest.mark.parametrize("keys", [["self_attn.q_proj", "mlp.down_proj"], ["model.layers.2.self_attn.v_proj"]])
@pytest.mark.parametrize("rank", [4, 80], ids=["rank 4", "rank above the dimension"])
def test_an_adapter_in_mlx_lms_format_reads_with_its_logits(
    tiny_path: Path, tmp_path: Path, keys: list[str], rank: int
) -> None:
    """Its scale is its own, here 20 and not alpha / rank."""
    theirs, _ = mlx_lm.utils.load(str(tiny_path))
    parameters = {"rank": rank, "scale": 20.0, "dropout": 0.1, "keys": keys}
    linear_to_lora_layers(theirs, 2, parameters)
    arrays = {}
    for path, module in theirs.named_modules():
        if "lora_b" in module:
            module.lora_b = 0.05 * mx.random.normal(module.lora_b.shape)
            arrays |= {f"{path}.lora_a": module.lora_a, f"{path}.lora_b": module.lora_b}
    folder = tmp_path / "theirs"
    folder.mkdir()
    mx.save_safetensors(str(folder / WEIGHTS), arrays)
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (folder / CONFIG).write_text(json.dumps(config))

    loaded = load(tiny_path)
    stored = read(folder)
    put(loaded.model, wrappers_for(loaded.model, stored))
    theirs.eval()
    np.testing.assert_allclose(loaded.model(TOKENS), theirs(TOKENS), rtol=1e-4, atol=1e-4)
    assert stored.manifest.base is None and stored.manifest.method == "lora"


def arrays_changed(change: Callable[[dict[str, mx.array]], Any]) -> Callable[[Path], None]:
    """Change the arrays and make the manifest agree, so that nothing but the arrays is at fault."""

    def apply(path: Path) -> None:
        arrays = dict(mx.load(str(path / WEIGHTS)))
        mx.eval(arrays)
        change(arrays)
        (path / WEIGHTS).unlink()
        mx.save_safetensors(str(path / WEIGHTS), arrays)
        json_changed(MANIFEST, weights_sha256="")(path)

    return apply


def json_changed(file: str, **values: Any) -> Callable[[Path], None]:
    return lambda path: (path / file).write_text(json.dumps(json.loads((path / file).read_text()) | values)) and None


def written_over(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda path: (path / file).write_bytes(content) and None


Q, V = "model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.v_proj"
TWICE = b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
NAN = mx.full((64, 4), float("nan"))
DAMAGED: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "no weights": (lambda path: (path / WEIGHTS).unlink(), ["adapters.safetensors missing"]),
    "a pickle": (written_over(WEIGHTS, pickle.dumps({"a": 1})), ["not a readable safetensors file"]),
    "cut short": (lambda path: written_over(WEIGHTS, (path / WEIGHTS).read_bytes()[:-9])(path), ["not a readable"]),
    "another file": (
        lambda path: mx.save_safetensors(str(path / WEIGHTS), {f"{Q}.lora_a": mx.zeros((64, 4))}),
        ["not the file that the manifest describes"],
    ),
    "broken configuration": (written_over(CONFIG, b"{"), ["adapter_config.json: not readable as JSON"]),
    "broken manifest": (written_over(MANIFEST, b"[]"), ["manifest.json: holds no JSON object"]),
    "manifest without modules": (json_changed(MANIFEST, modules=None), ["manifest.json: modules"]),
    "manifest of no modules": (json_changed(MANIFEST, modules=[]), ["manifest.json: modules"]),
    "a module without its scale": (json_changed(MANIFEST, scales={}), ["each with its scale"]),
    "a scale that is no number": (json_changed(MANIFEST, scales={Q: float("nan")}), ["NaN is not a number here"]),
    "a configured scale that is none": (
        json_changed(CONFIG, lora_parameters={"rank": 8, "scale": float("inf")}),
        ["Infinity is not a number here"],
    ),
    "a rank beyond numbers": (
        lambda path: (
            json_changed(CONFIG, lora_parameters={"rank": 10**400, "scale": 1.5})(path) or (path / MANIFEST).unlink()
        ),
        ["no usable rank and scale"],
    ),
    "a manifest to wait for": (
        lambda path: (path / MANIFEST).unlink() or os.mkfifo(path / MANIFEST),
        ["manifest.json: is a pipe"],
    ),
    "nested without end": (written_over(CONFIG, b"[" * 100000), ["nested too deeply"]),
    "a name twice": (
        written_over(WEIGHTS, len(TWICE).to_bytes(8, "little") + TWICE),
        ["not a readable safetensors file (a name is given twice)"],
    ),
    "unknown method": (json_changed(MANIFEST, adapter={"method": "lore"}), ["manifest.json: method", "'lore'"]),
    "newer schema": (json_changed(MANIFEST, schema_version=99), ["newer than this mlx-lora"]),
    "no rank": (json_changed(CONFIG, lora_parameters={"scale": 2.0}), ["no usable rank and scale"]),
    "another kind": (json_changed(CONFIG, fine_tune_type="full"), ["fine_tune_type 'full' is not supported"]),
    "nothing in it": (arrays_changed(lambda arrays: arrays.clear()), ["holds no tensors"]),
    "NaN": (
        arrays_changed(lambda arrays: arrays.update({f"{Q}.lora_a": NAN, f"{V}.lora_a": NAN / 0})),
        [f"{Q}.lora_a holds NaN", f"{V}.lora_a holds NaN"],
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_adapter_is_refused_before_a_base_is_needed(written: Path, case: str) -> None:
    """Damaged files are refused, whatever the damage."""
    damage, messages = DAMAGED[case]
    damage(written)
    with pytest.raises(AdapterError) as caught:
        read(written)
    assert all(message in str(caught.value) for message in [*messages, str(written)]), str(caught.value)


MISFIT: dict[str, tuple[Callable[[dict[str, mx.array]], Any], list[str]]] = {
    "missing": (lambda arrays: arrays.pop(f"{Q}.lora_b"), [f"{Q}.lora_b is missing"]),
    "missing module": (
        lambda arrays: [arrays.pop(f"{V}.lora_{factor}") for factor in "ab"],
        [f"{V}.lora_a is missing", f"{V}.lora_b is missing"],
    ),
    "extra": (lambda arrays: arrays.update({f"{Q}.m": mx.zeros(4)}), [f"{Q}.m is not part of this method"]),
    "another module": (
        lambda arrays: arrays.update({"model.layers.9.self_attn.q_proj.lora_a": mx.zeros((64, 4))}),
        ["model.layers.9.self_attn.q_proj is no layer of the base"],
    ),
    "shapes": (
        lambda arrays: arrays.update({f"{Q}.lora_a": mx.zeros((32, 4)), f"{V}.lora_b": mx.zeros((8, 32))}),
        [f"{Q}.lora_a has shape (32, 4), the base needs (64, 4)", f"{V}.lora_b has shape (8, 32)"],
    ),
}
MISFIT["all at once"] = (
    lambda arrays: [MISFIT[case][0](arrays) for case in ("extra", "another module", "shapes")],
    [message for case in ("extra", "another module", "shapes") for message in MISFIT[case][1]],
)


@pytest.mark.parametrize("case", MISFIT)
def test_tensors_that_do_not_fit_are_listed_in_one_error(written: Path, tiny: LoadedModel, case: str) -> None:
    """Nothing missing, extra or misshapen is let through."""
    change, messages = MISFIT[case]
    arrays_changed(change)(written)
    with pytest.raises(AdapterError) as caught:
        wrappers_for(tiny.model, read(written))
    assert all(message in str(caught.value) for message in messages), str(caught.value)


def test_a_name_in_use_is_refused_and_force_replaces_it(written: Path, tiny: LoadedModel) -> None:
    """Nothing is written in place: a crash must not pair new files with old ones."""
    before = (written / WEIGHTS).read_bytes()
    wrappers, manifest = trained(tiny, rank=2)
    with pytest.raises(NameTaken):
        save(written, wrappers, manifest, layers=3)
    assert (written / WEIGHTS).read_bytes() == before
    save(written, wrappers, manifest, layers=3, force=True)
    assert read(written).rank == 2
    assert [entry.name for entry in written.parent.iterdir() if entry.name.startswith(".")] == []
