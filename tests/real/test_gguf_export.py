"""Exported GGUF files in llama.cpp: every architecture as an adapter and merged, and real models with real adapters."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.adapters.attach import Wrappers, build, put
from mlx_lora.config import Adapter, Data
from mlx_lora.interop.gate import mean_divergence, most_likely
from mlx_lora.interop.gguf.adapter import write_adapter
from mlx_lora.interop.gguf.model import kinds_for, write_model
from mlx_lora.interop.gguf.plan import plan_of
from mlx_lora.interop.gguf.program import continuations, top_tokens
from mlx_lora.interop.gguf.tokenizer import tokenizer_fields
from mlx_lora.interop.gguf.types import form_of
from mlx_lora.interop.neutral import from_wrappers
from mlx_lora.models.gguf import import_gguf
from mlx_lora.models.load import LoadedModel, load, load_stored, ready
from mlx_lora.models.open import load_tokenizer
from mlx_lora.study.evaluate import questions
from tests.models.tiny_gguf import OWN, write_tiny
from tests.real.conftest import ROOT, Shell
from tests.real.test_gguf_llamacpp import PROMPTS as FIRST_PROMPTS
from tests.real.test_gguf_llamacpp import greedy

pytestmark = pytest.mark.real
pytest.importorskip("xllamacpp", reason="llama.cpp's bindings are not installed (pip install xllamacpp)")

VOCABULARY = 272
IDS = np.random.default_rng(1).integers(3, 260, 24).tolist()
PROBABLE = -20.0  # nats
# llama.cpp looks GELU up in a table in half precision, which is 2e-3 on gemma3; elsewhere differences are under 1e-3.
TOLERANCE = 5e-3


def drawn(model: Any, **settings: Any) -> Wrappers:
    """An adapter on every projection, with updates that change what the model says."""
    config = Adapter.model_validate({"rank": 2, "alpha": 4, "targets": "all-linear", **settings})
    wrappers = build(model, config, seed=1)
    for index, wrapper in enumerate(wrappers.values()):
        for number, name in enumerate(wrapper.adapter_params()):
            noise = 0.1 * mx.random.normal(wrapper[name].shape, key=mx.random.key(97 * index + number))
            wrapper[name] = wrapper[name] + noise
    return wrappers


def log_probabilities(model: Any, ids: list[int]) -> np.ndarray:
    logits = model(mx.array([ids]))[0, -1].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits))


def furthest(theirs: dict[int, float], ours: np.ndarray) -> float:
    """The largest difference over all tokens that are not improbable."""
    probable = {token: value for token, value in theirs.items() if value > PROBABLE}
    assert len(theirs) == VOCABULARY and len(probable) > 100
    return max(abs(ours[token] - value) for token, value in probable.items())


@pytest.fixture(params=OWN)
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, LoadedModel]:
    """A tiny random GGUF of an architecture, and the MLX model that it imports as."""
    file = write_tiny(tmp_path / "base.gguf", request.param)
    import_gguf(file, tmp_path / "mlx", dtype="float32")
    return file, load_stored(tmp_path / "mlx", lazily=True)


def test_an_adapter_says_in_llama_cpp_what_it_says_here(tiny: tuple[Path, LoadedModel], tmp_path: Path) -> None:
    file, base = tiny
    wrappers = drawn(base.model)
    plan = plan_of(base.config)
    out = write_adapter(from_wrappers(wrappers), plan, tmp_path / "adapter.gguf")
    model = ready(base).model
    before = log_probabilities(model, IDS)
    put(model, wrappers)
    ours = log_probabilities(model, IDS)
    assert np.abs(ours - before).max() > 4 * TOLERANCE
    assert furthest(top_tokens(file, [IDS], VOCABULARY)[0], before) < TOLERANCE
    assert furthest(top_tokens(file, [IDS], VOCABULARY, out)[0], ours) < TOLERANCE


def test_a_merged_model_says_in_llama_cpp_what_base_and_adapter_say(
    tiny: tuple[Path, LoadedModel], tmp_path: Path
) -> None:
    _, base = tiny
    wrappers = drawn(base.model)
    loaded = ready(base)
    put(loaded.model, wrappers)
    ours = log_probabilities(loaded.model, IDS)
    again = load_stored(tmp_path / "mlx", lazily=True)
    plan = plan_of(again.config)
    file = tmp_path / "merged.gguf"
    fields = tokenizer_fields(again.tokenizer, VOCABULARY)
    write = partial(write_model, again, drawn(again.model), plan, form_of("f32"), fields, file)
    assert write().kept == pytest.approx(1, abs=1e-3)
    assert furthest(top_tokens(file, [IDS], VOCABULARY)[0], ours) < TOLERANCE


PROMPTS = (
    *FIRST_PROMPTS,
    "Dear Sir or Madam,\n",
    "Q: What is the tallest mountain?\nA:",
    "The three primary colours are",
    "In 1969, the first",
    "My favourite recipe begins with",
)
DRAWN = {"targets": "attention", "alpha": 0.5}  # an adapter whose text differs from the base's
TIE = 0.05  # nats between the two likeliest tokens
NEXT = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf-export")


@pytest.fixture(scope="module")
def adapted(smollm2: Path) -> tuple[LoadedModel, Wrappers]:
    """SmolLM2 in float32, and an adapter that changes what it writes."""
    base = load_stored(smollm2, lazily=True)
    return base, drawn(base.model, **DRAWN)


def merged(directory: Path, form: str, out: Path, *, fields: Any = None, **settings: Any) -> Path:
    """Base and drawn adapter, or the base alone without settings, in a format, as `export gguf --fused` writes them."""
    opened = [load_stored(directory, lazily=True) for _ in range(2)]
    wrappers = [drawn(base.model, **settings) if settings else {} for base in opened]
    plan = plan_of(opened[0].config)
    kinds = kinds_for(opened[0], wrappers[0], plan, form_of(form))
    fields = fields or tokenizer_fields(opened[1].tokenizer, opened[1].config["vocab_size"])
    write_model(opened[1], wrappers[1], plan, form_of(form), fields, out, kinds=kinds)
    return out


@pytest.fixture(scope="module")
def plain(smollm2: Path, folder: Path) -> Path:
    return merged(smollm2, "f32", folder / "base.gguf")


def test_smollm2_comes_out_as_it_came_in(smollm2_gguf: Path, plain: Path) -> None:
    """Every value of the file that was imported, and the tokenizer's and the model's metadata."""
    before, after = gguf.GGUFReader(smollm2_gguf), gguf.GGUFReader(plain)
    tensors = {tensor.name: tensor.data for tensor in after.tensors}
    assert tensors.keys() == {tensor.name for tensor in before.tensors}
    for tensor in before.tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(tensors[tensor.name], expected, tensor.name)
    fields = {name: field.contents() for name, field in after.fields.items()}
    own = ("llama.", "tokenizer.")
    for name, field in before.fields.items():
        if name.startswith(own) and name not in ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix"):
            expected = field.contents()
            assert fields[name] == (pytest.approx(expected) if isinstance(expected, float) else expected), name


def compared(
    model: Any, ends: set[int], tokenizer: Any, file: Path, adapter: Path | None = None, *, most: int = len(PROMPTS)
) -> list[str]:
    """What llama.cpp writes after the first prompts; it leaves our greedy text at ties only."""
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS[:most]]
    texts = []
    for ids, steps in zip(prompts, continuations(file, prompts, NEXT, count=5, adapter=adapter), strict=True):
        ours = greedy(model, ids, NEXT, ends)
        for token, (theirs, top) in zip(ours, steps, strict=False):
            if token != theirs:
                assert top[theirs] - top.get(token, -np.inf) < TIE, f"{token} against {top}"
                break
        texts.append(tokenizer.decode([token for token, _ in steps]))
    return texts


def test_an_adapter_over_smollm2_writes_in_llama_cpp_what_it_writes_here(
    smollm2: Path, adapted: tuple[LoadedModel, Wrappers], plain: Path, folder: Path
) -> None:
    base, wrappers = adapted
    out = write_adapter(from_wrappers(wrappers), plan_of(base.config), folder / "adapter.gguf")
    loaded = load(smollm2)
    put(loaded.model, wrappers)
    ends = loaded.tokenizer.eos_token_ids
    with_it = compared(loaded.model, ends, loaded.tokenizer, plain, out)
    prompts = [loaded.tokenizer.encode(prompt) for prompt in PROMPTS]
    steps = continuations(plain, prompts, NEXT, count=1)
    without = [loaded.tokenizer.decode([token for token, _ in own]) for own in steps]
    assert sum(one != other for one, other in zip(with_it, without, strict=True)) > len(PROMPTS) / 2


def top_kl(ours: Any, file: Path, prompts: list[list[int]]) -> float:
    """Mean KL over the likeliest 100 tokens from the live model to llama.cpp, in nats."""
    theirs = top_tokens(file, prompts, 1000)
    live = [most_likely(log_probabilities(ours, ids)[None])[0] for ids in prompts]
    return mean_divergence(live, theirs)


# Measured: SmolLM2 3e-6, 3.6e-3, 3.3e-3 (its base lies on Q4_1's grid, so merged weights become Q8_0); Gemma 3 8e-6,
# 2.5e-3, 0.175.
BOUNDS = {"f16": 1e-3, "q8_0": 2e-2, "q4_1": 0.3}


def test_smollm2_merged_is_as_far_from_base_and_adapter_as_its_format_makes_it(smollm2: Path, folder: Path) -> None:
    loaded = load(smollm2)
    put(loaded.model, drawn(loaded.model, **DRAWN))
    prompts = [loaded.tokenizer.encode(prompt) for prompt in PROMPTS]
    for form, bound in BOUNDS.items():
        file = merged(smollm2, form, folder / f"{form}.gguf", **DRAWN)
        kl = top_kl(loaded.model, file, prompts)
        print(form, kl)
        assert kl < bound, form
        if form == "f16":
            compared(loaded.model, loaded.tokenizer.eos_token_ids, loaded.tokenizer, file)


def test_gemma_3_merged_is_as_far_from_base_and_adapter_as_its_format_makes_it(gemma3_gguf: Path, folder: Path) -> None:
    import_gguf(gemma3_gguf, folder / "gemma3", dtype="float32")
    loaded = load(folder / "gemma3")
    fields = tokenizer_fields(loaded.tokenizer, loaded.config["vocab_size"])
    put(loaded.model, drawn(loaded.model, **DRAWN))
    prompts = [loaded.tokenizer.encode(prompt) for prompt in PROMPTS]
    for form, bound in BOUNDS.items():
        file = merged(folder / "gemma3", form, folder / f"gemma3-{form}.gguf", fields=fields, **DRAWN)
        kl = top_kl(loaded.model, file, prompts)
        print(form, kl)
        assert kl < bound, form
        if form == "f16":
            compared(loaded.model, loaded.tokenizer.eos_token_ids, loaded.tokenizer, file, most=5)
        file.unlink()


@pytest.mark.parametrize("task", ["sql", "mail", "notes"])
def test_merged_gguf_answers_a_task_as_often_right(shell: Shell, folder: Path, task: str) -> None:
    """The embedded base with a quickstart adapter, in 4 bits as it was trained: exact match within 0.03."""
    shell.json("train", ROOT / f"recipes/{task}.yaml", "--name", task)
    data = ROOT / "data/tasks" / task
    ours = shell.json("eval", "--adapter", task, "--model", ROOT / "data/base", "--data", data, "--exact")
    (own,) = (result["exact_match"] for result in ours["results"] if result["adapter"] == task)
    tokenizer = load_tokenizer(ROOT / "data/base")
    asked = questions(str(data), Data(), tokenizer, exact=True)
    for form in ("f16", "q8_0"):
        file = folder / f"{task}-{form}.gguf"
        words = ("--adapter", task, "--model", ROOT / "data/base", "--fused", "--type", form, "--out", file)
        report = shell.json("export", "gguf", *words)
        assert report["check"]["kept"] > 0.95 and report["check"]["kl"] < BOUNDS[form]
        answers = continuations(file, asked.prompts, 64, count=1)
        said = [[token for token, _ in steps if token not in tokenizer.eos_token_ids] for steps in answers]
        pairs = zip(said, asked.answers, strict=True)
        right = [tokenizer.decode(tokens).strip() == answer.strip() for tokens, answer in pairs]
        assert abs(sum(right) / len(right) - own) <= 0.03, form
