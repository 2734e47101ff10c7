"""What every test stands on: a private home, no network, a tiny model directory and a byte-level tokenizer.

The model directory is a real one, with random weights: everything that loads, trains or saves does so for real.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.machine import blas, device, offline

offline.set_hub_variables()
if "PYTEST_XDIST_WORKER" in os.environ:  # of several: threads that wait for each other would take their time
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
blas.load_blas()
# A shell that isn't interactive starts what it puts in the background deaf to Ctrl-C, and with it all it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

import mlx.core as mx  # noqa: E402  (after the BLAS it binds to)
from mlx.utils import tree_flatten  # noqa: E402

from mlx_lora.models.load import LoadedModel, load  # noqa: E402

AS_GPU = Path(__file__).with_name("as_gpu")
# Files that take minutes. With `--dist loadfile` one process takes a whole file: last, it would leave the others idle.
LONGEST = ("test_wikisql.py", "test_everyday_recipes.py", "test_gguf_export.py", "test_distributed.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--as-gpu", action="store_true", help="take the package's branches for a GPU, on the CPU backend")


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported, so that what those ask for at their top is answered alike."""
    if config.getoption("--as-gpu"):
        importlib.import_module("tests.as_gpu.sitecustomize")
        paths = [str(AS_GPU), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # of the processes that tests start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is about the other kind of device, with the marker's reason; begin with the longest files."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    other = "processor" if device.on_gpu() else "gpu"
    for item in items:
        if marker := item.get_closest_marker(other):
            (reason,) = marker.args
            item.add_marker(pytest.mark.skip(reason=f"about a {other}: {reason}"))


def pytest_collection_finish() -> None:
    """Keep the garbage collector from scanning what importing made: it stays to the end, and scans took a tenth."""
    gc.collect()
    gc.freeze()


TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role not in ('system', 'user', 'assistant', 'tool') %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}"
    "{% if m.tool_calls is defined and m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<pad>"]
VOCABULARY = 256 + len(SPECIALS)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory of the test's own."""
    path = tmp_path / "home"
    monkeypatch.setenv("MLX_LORA_HOME", str(path))
    return path


@pytest.fixture(autouse=True)
def no_network() -> Iterator[None]:
    """Connecting to anything but this machine is an error in every test."""
    with offline.network_guard():
        yield


def write_tokenizer(path: Path, *, template: str | None = TEMPLATE) -> None:
    """A byte-level tokenizer without merges: one token a byte, the specials after them, <|end|> ends a turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<pad>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)


def write_model(path: Path, *, seed: int = 0, dtype: mx.Dtype = mx.float32, **changes: Any) -> Path:
    """A Llama model directory with random weights; `changes` are config keys."""
    from mlx_lm.models.llama import Model, ModelArgs

    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": VOCABULARY,
        "tie_word_embeddings": True, "max_position_embeddings": 512, "rope_theta": 10000.0, "eos_token_id": 256,
    } | changes  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    mx.random.seed(seed)
    model = Model(ModelArgs.from_dict(config))
    model.set_dtype(dtype)
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (path / "config.json").write_text(json.dumps(config))
    write_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama directory; tests must not change it."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def tiny(tiny_path: Path) -> LoadedModel:
    """The tiny model, loaded afresh and ready to compute."""
    return load(tiny_path)


@pytest.fixture
def tokenizer(tiny: LoadedModel) -> Any:
    return tiny.tokenizer


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """`write_rows(rows, name="train.jsonl", folder="data")` writes a JSONL file and returns its path."""

    def write(rows: list[Any], *, name: str = "train.jsonl", folder: str = "data") -> Path:
        file = tmp_path / folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return file

    return write


def questions(count: int, *, start: int = 0) -> list[dict[str, str]]:
    """Prompt and completion rows a tiny model can learn."""
    return [
        {"prompt": f"say {index % 7} twice", "completion": f"{index % 7}{index % 7}"}
        for index in range(start, start + count)
    ]
