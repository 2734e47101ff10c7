"""Tokenizers with other chat templates, and conversations whose learned parts are known by heart."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.config import Data
from mlx_lora.data.encode import Encoder
from mlx_lora.data.sources import FORMATS, detect
from mlx_lora.models.open import load_tokenizer
from tests.conftest import TEMPLATE, write_tokenizer
from tests.data.thinking_templates import CHANNEL, OPENING

TEMPLATES = {
    "plain": TEMPLATE,
    "none": None,
    # An empty think block before the last answer only, as Qwen3 writes it.
    "thinking": (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
        "{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    # The question reads differently once its answer follows.
    "rewriting": (
        "{% if messages[-1].role == 'assistant' %}Solved. {% endif %}"
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    # Nothing ends a turn.
    "bare": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    ),
    # Only answers are ended, and nothing follows the end.
    "answers": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<|end|>"
        "{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
    ),
    # Knows no tools, says nothing about it.
    "toolless": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    # The tools stand before the conversation.
    "tools": (
        "{% if tools %}{{ tools | map(attribute='function') | map(attribute='name') | join }}{% endif %}"
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}<|end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "opening": OPENING,
    "channel": CHANNEL,
    # R1's kind: the prompt opens thinking, and no answer ever shows any.
    "hiding": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    ),
    # Qwen3's kind: the last answer shows a block, and thinking off puts an empty one into the prompt.
    "switching": (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}<think>\n"
        "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}"
        "{{ m.tool_calls | tojson if m.tool_calls }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>"
        "{{ '' if enable_thinking else '<think>\n\n</think>\n\n' }}{% endif %}"
    ),
    "calling": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>"
        "{{ call.function.name }}</tool_call>{% endfor %}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    ),
    "told": (
        "{{ 'think' if enable_thinking else 'quiet' }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    # Some hundredths of a second for each view.
    "slow": (
        "{% for i in range(300) %}{% for j in range(300) %}{% endfor %}{% endfor %}"
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "nothing": "<|user|>{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "short": (
        "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "argued": (
        "{{ tone }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    # An error that quotes the row.
    "quoting": "{{ raise_exception('refused: ' + messages[0].content) }}",
}


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`tokenizers("thinking")`: the byte tokenizer with one of TEMPLATES; with `adds_end` it writes <|end|> itself."""

    @cache
    def make(template: str = "plain", *, adds_end: bool = False) -> Any:
        path = tmp_path_factory.mktemp("tokenizer")
        write_tokenizer(path, template=TEMPLATES[template])
        (path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 256}))
        if adds_end:
            _add_end(path / "tokenizer.json")
        return load_tokenizer(path)

    return make


def _add_end(file: Path) -> None:
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", tokenizer.token_to_id("<|end|>"))]
    )
    tokenizer.save(str(file))


@pytest.fixture
def encoder(tokenizers: Callable[..., Any]) -> Callable[..., Encoder]:
    """`encoder("thinking", mask="last")`: an Encoder with a template and data settings."""

    def make(template: str = "plain", /, **settings: Any) -> Encoder:
        return Encoder(tokenizers(template), Data(**settings))

    return make


END = "<|end|>"


def example(row: dict[str, Any]) -> Any:
    """A row of any format as an Example."""
    return FORMATS[str(detect(row))].parse(row)


def shown(encoder: Encoder, row: dict[str, Any]) -> tuple[str, list[str]]:
    """The whole row as text, and each run of tokens that carries loss as text."""
    ((tokens, weights),) = encoder.rows(example(row))
    assert len(tokens) == len(weights) and weights[0] == 0
    runs: list[list[int]] = []
    for index, weight in enumerate(weights):
        if weight and not weights[index - 1]:
            runs.append([])
        if weight:
            runs[-1].append(tokens[index])
    return encoder.tokenizer.decode(tokens), [encoder.tokenizer.decode(run) for run in runs]


def message(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALL = {"type": "function", "function": {"name": "rain", "arguments": '{"town": "Tellmar"}'}}
# As a template shows it: the arguments are an object, not text quoted twice.
CALLED = '[{"type": "function", "function": {"name": "rain", "arguments": {"town": "Tellmar"}}}]'
TOOLS = [{"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}]
TALK = [message("system", "Be brief."), message("user", "hi"), message("assistant", "hello"), message("user", "rain?")]
ANSWER = [message("assistant", None, tool_calls=[CALL]), message("tool", "yes"), message("assistant", "It rains.")]

ROWS: dict[str, dict[str, Any]] = {
    "text": {"text": "a plain text"},
    "completions": {"prompt": "two and two", "completion": "four"},
    "completion lists": {"prompt": TALK, "completion": ANSWER, "tools": TOOLS},
    "messages": {"messages": TALK + ANSWER, "tools": TOOLS},
    "alpaca": {
        "instruction": "Add.", "input": "2 2", "output": "4", "system": "Count.", "history": [["Hi?", "Hi."]],
    },
    "alpaca alone": {"instruction": "Add.", "input": "2 2", "output": "4"},
    "sharegpt": {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"},
            {"from": "human", "value": "rain?"}, {"from": "gpt", "value": "no"},
        ],
    },
}  # fmt: skip
