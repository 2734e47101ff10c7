"""Ten conversations, as people have them with Ollama, and the chat templates that they are rendered with."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_lora.interop.ollama.turns import Turns
from mlx_lora.models import chat_templates
from mlx_lora.models.chat_format import ChatFormat
from tests.interop.ollama.golang import collated

Messages = list[dict[str, str]]


def talk(*contents: str, system: str | None = None) -> Messages:
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    return [*([{"role": "system", "content": system}] if system else []), *turns]


def twice(role: str, messages: Messages) -> Messages:
    """The first message of a role, followed by another of that role."""
    at = next(index for index, message in enumerate(messages) if message["role"] == role)
    return [*messages[: at + 1], {"role": role, "content": "And more,\nof the same."}, *messages[at + 1 :]]


TEN: tuple[Messages, ...] = (
    talk("Hi"),
    talk("What is {{ .System }} in Go?", system="You explain templates."),
    talk("Name one.", "Bern.", "Another?"),
    talk("Name one.", "Bern.", "Another?", system="Answer in one word.\nNo more."),
    talk("a", "b", "c", "d", "e", "f", "g"),
    talk('Quote """this"""', 'It\'s "quoted".', "Thanks <b>you</b> & bye"),
    twice("user", talk("First", "Yes?", "Second", system="Be kind")),
    twice("assistant", talk("First", "Yes?", "Second")),
    twice("system", talk("First", "Yes?", "Second", system="Be kind")),
    talk("Zürich – 東京 🙂?", "```python\nprint('{%s}')\n```", "Und\n\n\nnun?", system="Antworte  kurz: {}"),
)


def expected(chats: ChatFormat, messages: Messages, *, thinking: bool | None = None, bos: str = "") -> str:
    """The chat template's own prompt for what Ollama makes of the messages."""
    _, merged = collated(messages)
    return chats.texts(merged, (), [chats.view(len(merged), prompt=True, thinking=thinking)])[0].removeprefix(bos)


def tokenizer_with(folder: Path, *specials: str, bos: str | None = None) -> Any:
    """A byte-level tokenizer with these special tokens, the last of which ends an answer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from mlx_lora.models.open import load_tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([*([bos] if bos else []), *specials])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": specials[-1], "bos_token": bos}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return load_tokenizer(folder)


def written(name: str, folder: Path) -> ChatFormat:
    """One of our own templates, with a vocabulary that has its markers."""
    end = chat_templates.ENDS[name] or "</s>"
    markers = [marker for marker in chat_templates.MARKERS[name] if marker.startswith("<")]
    tokenizer = tokenizer_with(folder, *markers, end)
    text, own_end = chat_templates.find(name, tokenizer)
    return ChatFormat(tokenizer, text, own_end=own_end)


def any_turns(count: int) -> Iterator[Turns]:
    """Turns of texts that a template language or a Modelfile could take for something else."""
    draw = random.Random(0)
    pieces = ['"', '""', " ", "\n", "{{", "}}", "{", "{{-", "-}}", "/*", "`", "\\", "\u00a0", "🙂", "\U000e0001", "|"]
    for _ in range(count):
        words = ["".join(draw.choices(pieces, k=draw.randint(0, 5))) for _ in range(8)]
        place = draw.choice(["turn", "top", "first", "last", "none"])
        yield Turns(*words[:5], no_system=words[5], system=place, system_open=words[6], system_close=words[7])


# Shapes of well-known templates, in as few words as show them.
SHAPES = {
    # a default system message
    "smollm2": "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe helpful"
    "<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    # the assistant's header closes each question, with or without a prompt
    "phi3": "{% for m in messages %}{% if m.role == 'system' %}<|system|>\n{{ m.content }}<|end|>\n"
    "{% elif m.role == 'user' %}<|user|>\n{{ m.content }}<|end|>\n<|assistant|>\n"
    "{% elif m.role == 'assistant' %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}",
    # without a prompt it ends in the end token
    "phi4": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}</s>{% endif %}",
    # the system message in the last question
    "mistral3": "{% set ns = namespace(s='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.s = m.content %}{% elif m.role == 'user' %}[INST] {% if loop.last and ns.s %}{{ ns.s }}\n\n"
    "{% endif %}{{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
    # text of the template's own around the system message, also when there is none
    "llama31": "<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}"
    "<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    # a system message that the template leaves out
    "none": "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\n{% elif m.role == 'assistant' %}"
    "A: {{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}",
    # markers that Go, or a Modelfile, would take for its own
    "awkward": '{% for m in messages %}{{ \'{{\' }}{{ m.role }}\u00a0"""\u200b{{ m.content }}""""}}\n{% endfor %}'
    '{% if add_generation_prompt %}{{ \'{{\' }}assistant\u00a0"""\u200b{% endif %}',
}
