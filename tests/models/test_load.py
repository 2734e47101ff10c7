"""Loading from disk and nowhere else: what is refused, what is found, and what comes out."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora import paths
from mlx_lora.config import Quantize
from mlx_lora.errors import ModelError, NameTaken
from mlx_lora.models.layers import dequantize_model, plain_layer
from mlx_lora.models.load import load, load_stored
from mlx_lora.models.open import find_model, load_tokenizer
from mlx_lora.models.save import save
from mlx_lora.quant.matmul import DequantizingLinear
from mlx_lora.quant.quantize import is_quantized, quantize
from tests.adapters.zoo import network
from tests.conftest import write_model

TOKENS = mx.array([[5, 9, 70, 2, 33, 11, 8]])


@pytest.fixture
def directory(tiny_path: Path, tmp_path: Path) -> Path:
    """A model directory of the test's own."""
    return Path(shutil.copytree(tiny_path, tmp_path / "copy"))


def change_json(file: str, **values: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / file).write_text(json.dumps(json.loads((path / file).read_text()) | values))

    return change


def replace(file: str, content: bytes | None) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / file).unlink(missing_ok=True)
        if content is not None:
            (path / file).write_bytes(content)

    return change


def header(values: dict[str, Any], length: int | None = None, data: bytes = b"\0" * 8) -> bytes:
    """A safetensors file as bytes."""
    text = json.dumps(values).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(start: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]}


def only_a_pickle(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": 1}))


def only_code_for_a_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()
    (path / "vocab.json").write_text("{}")
    (path / "evil.py").write_text("raise SystemExit('code from a model directory ran')")
    config = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 538090408\n"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no configuration": (replace("config.json", None), "config.json is missing"),
    "broken configuration": (replace("config.json", b"{"), "config.json: not readable as JSON"),
    "configuration of bytes": (replace("config.json", b"\xff\xfe{}"), "config.json: not readable as JSON"),
    "configuration of a list": (replace("config.json", b"[]"), "has no model_type"),
    "no architecture": (change_json("config.json", model_type=None), "has no model_type"),
    "unknown architecture": (change_json("config.json", model_type="nonesuch"), "can't be loaded.*nonesuch"),
    "model_file": (change_json("config.json", model_file="x.py"), "'model_file' asks to run code"),
    "code in a part": (change_json("config.json", a=[{"b": {"model_file": ""}}]), "'model_file' asks to run code"),
    "layers without end": (change_json("config.json", num_hidden_layers=1e9), "num_hidden_layers is 1000000000.0"),
    "experts without end": (change_json("config.json", moe={"n_routed_experts": 1 << 40}), "n_routed_experts is 1099"),
    "end tokens that are none": (change_json("config.json", eos_token_id=["a"]), "eos_token_id is neither a number"),
    "a setting that doesn't compute": (change_json("config.json", rope_theta="x"), 'config.json: rope_theta is "x"'),
    "attention": (change_json("config.json", _attn_implementation_internal="a/b"), "asks to run code"),
    "no weights": (replace(WEIGHTS, None), "missing weights"),
    "only a pickle": (only_a_pickle, r"pytorch_model.bin can run code and is never read"),
    "no tokenizer": (replace("tokenizer.json", None), "missing a tokenizer"),
    "code for a tokenizer": (only_code_for_a_tokenizer, "only code .* can make its tokenizer, EvilTokenizer"),
    "broken tokenizer": (replace("tokenizer.json", b"{"), "its tokenizer can't be loaded"),
    "wrong shapes": (change_json("config.json", hidden_size=32), "config.json: hidden_size is 32, which doesn't"),
    "missing tensors": (
        change_json("config.json", num_hidden_layers=4),
        "model.layers.3.input_layernorm.weight is missing, no file has it, and so are 8 more",
    ),
    "tensors of another model": (
        change_json("config.json", num_hidden_layers=2),
        "hold model.layers.2.input_layernorm.weight, and 8 more, which the model doesn't have",
    ),
    "a Git LFS pointer": (replace(WEIGHTS, LFS), "model.safetensors can't be loaded: .* Git LFS pointer"),
    "a Git LFS pointer for a tokenizer": (replace("tokenizer.json", LFS), "tokenizer.json is a Git LFS pointer"),
    "weights that are a pickle": (replace(WEIGHTS, pickle.dumps([1])), "not a readable safetensors file"),
    "empty weights": (replace(WEIGHTS, b""), "not a readable safetensors file"),
    "huge header": (replace(WEIGHTS, header({}, length=1 << 62)), "not a readable safetensors file"),
    "overlap": (replace(WEIGHTS, header({"a": tensor(0, 8), "b": tensor(4, 8)})), "not a readable safetensors file"),
    "bad offsets": (replace(WEIGHTS, header({"a": tensor(0, 800)})), "not a readable safetensors file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_directories_that_are_broken_or_run_code_are_refused(directory: Path, case: str) -> None:
    """Nothing in a model directory is run, and no header is trusted before it is checked."""
    breaking, message = REFUSED[case]
    breaking(directory)
    with pytest.raises(ModelError, match=message) as caught:
        load(directory)
    assert str(directory) in str(caught.value)


IGNORED: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "an index of shards that were never there": (
        replace(INDEX, b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "x"}}'),
        "names model-00001-of-00002.safetensors and 1 more, not here: ignored",
    ),
    "an index that leads elsewhere": (
        replace(INDEX, b'{"weight_map": {"a": "../copy/model.safetensors"}}'), r"names \.\./copy/model.safetensors",
    ),
    "an index of other tensors": (
        replace(INDEX, b'{"weight_map": {"model.norm.weight": "model.safetensors"}}'),
        "doesn't agree with the files about model.embed_tokens.weight and 27 more",
    ),
    "an index that is none": (replace(INDEX, b"[]"), "can't be read: ignored"),
    "code for transformers": (change_json("config.json", auto_map={"AutoModel": "x.Y"}), "config.json names code"),
    "code in a part": (change_json("config.json", a=[{"b": {"auto_map": {"A": "x.Y"}}}]), "config.json names code"),
    "code for a tokenizer": (
        change_json("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}),
        "tokenizer_config.json names code",
    ),
    "nothing": (lambda path: None, None),
}  # fmt: skip


@pytest.mark.parametrize("case", IGNORED)
def test_what_is_ignored_is_noted(directory: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    """The model loads as if it were not there, and code is never even read."""
    change, noted = IGNORED[case]
    change(directory)
    (directory / "evil.py").write_text("raise SystemExit('code from a model directory ran')")
    with caplog.at_level("INFO", "mlx_lora"):
        assert load(directory).tokenizer.encode("ab") == [64, 65]
    assert bool(caplog.messages) == (noted is not None)
    assert noted is None or all(re.search(noted, message) for message in caplog.messages), caplog.messages


def test_a_missing_tensor_is_looked_for_where_the_index_has_it(directory: Path) -> None:
    change_json("config.json", num_hidden_layers=4)(directory)
    replace(INDEX, b'{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')(directory)
    with pytest.raises(ModelError, match="model.layers.3") as caught:
        load(directory)
    assert "names model-00002-of-00002.safetensors, not here" in (caught.value.hint or "")


@pytest.mark.parametrize("known", [True, False], ids=["model", "no model"])
def test_a_tokenizer_class_that_only_code_has_is_refused_even_beside_tokenizer_json(
    directory: Path, known: bool
) -> None:
    """Whether transformers knows the model's type or not, it is never asked to choose another, nor to run code."""
    change_json("config.json", **({} if known else {"model_type": "exaone_moe"}))(directory)
    change_json("tokenizer_config.json", tokenizer_class="Evil", auto_map=["evil.Evil", None])(directory)
    with pytest.raises(ModelError, match="can make its tokenizer, Evil") as caught:
        load_tokenizer(directory)
    assert "PreTrainedTokenizerFast" in (caught.value.hint or "")


def test_everything_missing_is_listed_at_once(directory: Path) -> None:
    replace(WEIGHTS, None)(directory)
    replace("tokenizer.json", None)(directory)
    with pytest.raises(ModelError, match="missing weights.* and a tokenizer"):
        load(directory)


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("owner/model", "no directory 'owner/model'", "mlx-lora pull owner/model"),
        ("./modles/x", "no directory", "mlx-lora pull REPO"),
        ("~nobody-here/x", "no directory", "mlx-lora pull REPO"),
        ("qwen", "did you mean 'qwen3'?", "mlx-lora pull REPO"),
        ("../models/qwen3", "no directory", "mlx-lora pull REPO"),
        ("x" * 5000, "no directory", "mlx-lora pull REPO"),
    ],
)
def test_what_is_not_on_disk_is_an_error_that_names_pull(name: str, message: str, hint: str, home: Path) -> None:
    """A mistyped path or a repo id never goes to a hub (conftest refuses connections)."""
    (home / "models" / "qwen3").mkdir(parents=True)
    with pytest.raises(ModelError, match=message) as caught:
        load(name)
    assert caught.value.hint == hint


@pytest.mark.parametrize(("file", "hint"), [("m.gguf", "import-gguf"), ("m.safetensors", "directory that holds it")])
def test_a_file_is_no_model(tmp_path: Path, file: str, hint: str) -> None:
    (tmp_path / file).touch()
    with pytest.raises(ModelError, match="is a file") as caught:
        find_model(str(tmp_path / file))
    assert hint in (caught.value.hint or "")


def test_models_are_found_by_path_by_name_and_in_the_hub_cache(
    tiny_path: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    named = shutil.copytree(tiny_path, home / "models" / "mine")
    old, new = (cache / "models--owner--tiny" / "snapshots" / name for name in ("1111", "2222"))
    for age, snapshot in ((100, old), (0, new)):
        shutil.copytree(tiny_path, snapshot)
        os.utime(snapshot, (1e9 - age, 1e9 - age))
    assert find_model(str(tiny_path)) == tiny_path
    assert find_model("mine") == named
    assert find_model("owner/tiny") == new, "the newest snapshot"
    assert load("owner/tiny").model(TOKENS).shape == (1, 7, 262)


@pytest.mark.processor("computes in float32")
def test_the_base_is_frozen_in_evaluation_and_float32_on_a_cpu(tmp_path: Path) -> None:
    loaded = load(write_model(tmp_path / "half", dtype=mx.bfloat16), quantization=Quantize(bits=4))
    assert loaded.stored == mx.bfloat16 and loaded.dtype == mx.float32
    dtypes = {path: array.dtype for path, array in tree_flatten(loaded.model.parameters()) if array.dtype != mx.uint32}
    packed = {path for path in dtypes if path.endswith((".scales", ".biases"))}
    assert {dtypes[path] for path in packed} == {mx.bfloat16}
    assert {dtypes[path] for path in dtypes if path not in packed} == {mx.float32}
    assert not tree_flatten(loaded.model.trainable_parameters()) and not loaded.model.training
    assert isinstance(loaded.model.layers[0].self_attn.q_proj, DequantizingLinear)
    assert loaded.model(TOKENS).dtype == mx.float32


@pytest.mark.gpu("computes in the files' dtype, by MLX's own kernels")
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
def test_the_base_is_frozen_in_evaluation_and_in_the_files_dtype_on_a_gpu(dtype: mx.Dtype, tmp_path: Path) -> None:
    loaded = load(write_model(tmp_path / "half", dtype=dtype), quantization=Quantize(bits=4))
    assert loaded.stored == loaded.dtype == dtype
    arrays = tree_flatten(loaded.model.parameters())
    assert {array.dtype for _, array in arrays} == {dtype, mx.uint32}
    assert not tree_flatten(loaded.model.trainable_parameters()) and not loaded.model.training
    assert type(loaded.model.layers[0].self_attn.q_proj) is nn.QuantizedLinear
    assert loaded.model(TOKENS).dtype == dtype


def test_stored_tensors_are_as_the_files_hold_them(tmp_path: Path) -> None:
    loaded = load_stored(write_model(tmp_path / "half", dtype=mx.bfloat16))
    assert {array.dtype for _, array in tree_flatten(loaded.model.parameters())} == {mx.bfloat16}


def test_save_and_load_give_the_same_tensors_and_tokenizer(tiny_path: Path, tmp_path: Path) -> None:
    save(load_stored(tiny_path), tmp_path / "out")
    first, second = load_stored(tiny_path), load_stored(tmp_path / "out")
    for (name, a), (other, b) in zip(
        tree_flatten(first.model.parameters()), tree_flatten(second.model.parameters()), strict=True
    ):
        assert name == other and mx.array_equal(a, b)
    assert second.tokenizer.encode("héllo") == first.tokenizer.encode("héllo")
    assert second.tokenizer.chat_template == first.tokenizer.chat_template
    with pytest.raises(NameTaken):
        save(second, tmp_path / "out")


@pytest.mark.parametrize("bits", [3, 8])
def test_dequantizing_keeps_the_function_and_forgets_the_quantization(tiny_path: Path, bits: int) -> None:
    packed = load_stored(tiny_path, quantization=Quantize(bits=bits, group_size=32))
    before = np.array(packed.model(TOKENS))
    dequantize_model(packed, mx.float32)
    assert not is_quantized(packed.model)
    assert "quantization" not in packed.config and "quantization_config" not in packed.config
    np.testing.assert_allclose(packed.model(TOKENS), before, rtol=1e-4, atol=1e-4)


def test_dequantizing_reaches_experts() -> None:
    model = network("qwen3 experts")
    quantize(model, {"mode": "affine", "bits": 6, "group_size": 32})
    packed = model.model.layers[0].mlp.switch_mlp.up_proj
    plain = plain_layer(packed, mx.dequantize(packed.weight, packed.scales, packed.biases, group_size=32, bits=6))
    x, chosen = mx.random.normal((1, 1, 1, 1, 64)), mx.array([[[0, 3]]])
    np.testing.assert_allclose(plain(x, chosen), packed(x, chosen), rtol=1e-4, atol=1e-4)


def test_an_unknown_kind_of_packed_layer_is_refused_and_not_called_a_linear() -> None:
    with pytest.raises(ModelError, match="Conv1d can't be unpacked"):
        plain_layer(nn.Conv1d(1, 1, 1), mx.zeros((1, 1)))


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.real
def test_importing_leaves_file_limits_and_yaml_as_they_were() -> None:
    """Importing a library must not change the process's limits."""
    code = (
        "import resource, yaml; before = resource.getrlimit(resource.RLIMIT_NOFILE), yaml.safe_load('a: 1e-4')\n"
        "import mlx_lora.models.load, mlx_lora.serve.engine\n"
        "after = resource.getrlimit(resource.RLIMIT_NOFILE), yaml.safe_load('a: 1e-4')\n"
        "print(before == after or (before, after))"
    )
    assert run_python(code) == "True"


@pytest.mark.real
def test_pull_without_a_network_is_an_error_that_says_to_go_on(home: Path) -> None:
    """Whatever the hub's HTTP library raises; nothing listens on port 9."""
    code = (
        "from mlx_lora.errors import ModelError\nfrom mlx_lora.models.pull import pull\n"
        "try: pull('owner/model')\nexcept ModelError as error: print(error.message, '|', error.hint)"
    )
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "MLX_LORA_HOME": str(home)}
    assert run_python(code, **environment).startswith("can't pull owner/model: ")
    assert not (home / "models" / "model").exists()


def test_pull_refuses_a_name_in_use_before_it_connects(home: Path) -> None:
    from mlx_lora.models.pull import pull

    paths.room("models", "mine").mkdir(parents=True)
    with pytest.raises(NameTaken, match="'mine'"):
        pull("owner/mine")
