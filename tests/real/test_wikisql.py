"""A real model learns a real task at 4 bits, and mlx_lm agrees about what it learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest

from mlx_lora.adapters.attach import put
from mlx_lora.config import Data
from mlx_lora.data.batch import collate
from mlx_lora.data.encode import Encoder
from mlx_lora.data.read import read
from mlx_lora.data.rows import Row
from mlx_lora.models.load import LoadedModel, load
from mlx_lora.models.trunk.verify import take_apart
from mlx_lora.store import adapter as store
from mlx_lora.train.objectives.likelihood import Loss, as_arrays
from tests.real.conftest import Shell, run_mlx_lm

pytestmark = pytest.mark.real

TIE = 0.05
PROMPTS = ("What is the capital of France?", "Write one sentence about the sea.")


@pytest.fixture(scope="module")
def quantized(shell: Shell, smollm2: Path) -> Path:
    """The 4-bit base as a directory, with float32 scales so that mlx_lm computes in float32."""
    out = shell.home / "models" / "smollm2-4bit"
    shell.json("quantize", smollm2, out, "--bits", 4, "--group-size", 64)
    return out


def test_loss_falls_on_unseen_rows(shell: Shell, trained: dict[str, Any], smollm2: Path, wikisql: Path) -> None:
    """From about 2.6 to 0.45 or less per completion token; measured on the test file, which training never reads."""
    words = ("eval", "--model", smollm2, "--adapter", "wikisql", "--data", wikisql)
    base, adapter = shell.json(*words)["results"]
    print(f"\nloss {base['loss']:.3f} -> {adapter['loss']:.3f}, {trained['seconds']:.0f} s of training")
    assert base["adapter"] is None and 2.2 < base["loss"] < 3.0
    assert adapter["loss"] <= 0.45
    assert trained["iters"] == 60 and trained["skipped_steps"] == 0


@pytest.mark.parametrize("mask", ["all", "completion", "assistant", "last"])
def test_loss_equals_numpy_over_mlx_lm_logits(smollm2: Path, wikisql: Path, mask: str) -> None:
    """The independent computation: unpadded rows, mlx_lm's own model in float32, log-softmax in numpy float64."""
    ours, (theirs, _) = load(smollm2), mlx_lm.utils.load_model(smollm2)
    settings = Data(mask=mask, template="chat" if mask in ("assistant", "last") else "none")
    source = read(wikisql / "test.jsonl", settings)
    encoder = Encoder(ours.tokenizer, settings)
    order = sorted(range(len(source.examples)), key=lambda index: len(source.examples[index].plain[0]))  # type: ignore[index]
    chosen = [source.examples[index] for index in (*order[:3], order[-1])]  # three short rows and the longest
    rows = [Row(np.array(t, np.int32), np.array(w, np.float32)) for one in map(encoder.rows, chosen) for t, w in one]
    loss = Loss(take_apart(ours.model))(as_arrays(collate(rows))).item()
    assert loss == pytest.approx(sum(_numpy_loss(theirs, row) for row in rows), rel=1e-4)


def _numpy_loss(model: Any, row: Row) -> float:
    logits = np.array(model(mx.array(row.tokens[:-1])[None]))[0].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(-(log_probabilities[np.arange(len(row) - 1), row.tokens[1:]] * row.weights[1:]).sum())


def mlx_lm_says(model: Path, adapter: Path, prompt: str) -> str:
    """Unmodified `mlx_lm.generate --adapter-path`, greedy."""
    words = ("generate", "--model", model, "--adapter-path", adapter, "--prompt", prompt)
    return run_mlx_lm(*words, "--max-tokens", 24, "--temp", 0, "--verbose", False).strip()


def assert_same_text(loaded: LoadedModel, prompt: str, ours: str, theirs: str) -> None:
    """Equal, or apart only from a token on whose logits tie within TIE."""
    if ours == theirs:
        return
    tokenizer = loaded.tokenizer
    start = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    a, b = (tokenizer.encode(text, add_special_tokens=False) for text in (ours, theirs))
    fork = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    logits = loaded.model(mx.array([[*start, *a[:fork]]]))[0, -1]
    x, y = (tokens[fork] if fork < len(tokens) else tokenizer.eos_token_id for tokens in (a, b))
    assert abs((logits[x] - logits[y]).item()) < TIE, (ours, theirs)


def test_mlx_lm_reads_our_adapter(shell: Shell, trained: dict[str, Any], quantized: Path) -> None:
    path = Path(trained["adapter"])
    stored = store.read(path)
    loaded = load(quantized)
    put(loaded.model, store.wrappers_for(loaded.model, stored))
    for prompt in PROMPTS:
        # the adapter was trained without a template; both tools are asked through it, to compare like with like
        text = _generate(shell, quantized, path, prompt)
        assert_same_text(loaded, prompt, text.strip(), mlx_lm_says(quantized, path, prompt))


def _generate(shell: Shell, model: Path, adapter: Path, prompt: str) -> str:
    """Our `generate` through the chat template, as mlx_lm.generate asks."""
    from mlx_lora.serve.answer import Answer, prompt_tokens, stream_text
    from mlx_lora.serve.engine import Engine

    stored, loaded = store.read(adapter), load(model)
    engine = Engine(loaded)
    engine.add("it", store.wrappers_for(loaded.model, stored))
    engine.use("it")
    answer = Answer()
    tokens = prompt_tokens(loaded.tokenizer, [{"role": "user", "content": prompt}])
    list(stream_text(engine, tokens, answer, max_tokens=24))
    return answer.text


def test_fused_model_generates_in_mlx_lm(shell: Shell, trained: dict[str, Any], smollm2: Path, wikisql: Path) -> None:
    out = shell.home / "models" / "fused"
    report = shell.json("fuse", "--model", smollm2, "--adapter", "wikisql", "--out", out, "--data", wikisql)
    print(f"\n{report}")
    assert report["bits"] == "mixed" and report["delta_survival"] > 0.5 and report["top1_agreement"] > 0.9
    model, _ = mlx_lm.utils.load(str(out))
    assert np.isfinite(np.array(model(mx.array([[1, 2, 3]])))).all()


def test_lora_in_four_bits_is_refused_with_what_survives(
    shell: Shell, trained: dict[str, Any], smollm2: Path, wikisql: Path
) -> None:
    out = shell.home / "models" / "lora-keep"
    refused = shell(
        "fuse", "--model", smollm2, "--adapter", "wikisql", "--out", out, "--bits", "keep", "--data", wikisql
    )
    print(f"\n{refused.stderr}")
    assert refused.returncode and not out.exists()
    assert "% of the adapter's update survives at bits=keep" in refused.stderr


def test_transformers_runs_the_exported_model(shell: Shell, trained: dict[str, Any], tmp_path: Path) -> None:
    """What it says of the next token is what base and adapter say."""
    report = shell.json("export", "hf", "--adapter", "wikisql", "--out", tmp_path / "out")
    assert report["check"]["program"] == "transformers" and report["check"]["kept"] > 0.9
    assert report["check"]["kl"] < 1e-3 < report["check"]["adapter_kl"]
