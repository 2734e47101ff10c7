"""Ollama's template and stop words say what the chat template says, and the Modelfile is read as it was meant."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from mlx_lora.errors import AdapterError
from mlx_lora.interop.ollama.modelfile import Modelfile, dropped, parameters, quoted, stop_words
from mlx_lora.interop.ollama.template import PLAIN, go_template
from mlx_lora.interop.ollama.turns import Turns, learn
from mlx_lora.models import chat_templates
from mlx_lora.models.chat_format import ChatFormat
from tests.conftest import TEMPLATE
from tests.interop.ollama.conversations import SHAPES, TEN, any_turns, expected, talk, tokenizer_with, written
from tests.interop.ollama.golang import collated, execute
from tests.interop.ollama.reader import read_modelfile

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "</s>")
# What the shape says of a system message behind the start, where a chat template of that shape says another thing.
FIRST_ALONE = ("mistral3", "llama31")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tokenizer_with(tmp_path_factory.mktemp("words"), *SPECIAL)


@pytest.mark.parametrize("name", chat_templates.ENDS)
def test_our_own_templates_become_the_same_prompts(name: str, tmp_path: Path) -> None:
    chats = written(name, tmp_path)
    template = as_read(go_template(learn(chats)))
    assert learn(chats).family == name
    for messages in TEN:
        assert execute(template, messages) == expected(chats, messages)


@pytest.mark.parametrize("name", SHAPES)
def test_templates_of_other_shapes_become_the_same_prompts(name: str, tokenizer: Any) -> None:
    chats = ChatFormat(tokenizer, SHAPES[name])
    template = as_read(go_template(learn(chats)))
    for messages in TEN:
        assert execute(template, messages) == expected(chats, messages)


def as_read(template: str) -> str:
    """The template as Ollama reads it from a Modelfile."""
    commands = read_modelfile(Modelfile("./x.gguf", template=template).text())
    return dict(commands)["template"]


def test_an_answer_that_ends_the_conversation_goes_on(tmp_path: Path) -> None:
    chats = written("chatml", tmp_path)
    messages = talk("Q", "A", "Q", "The answer is")
    whole = chats.texts(messages, (), [chats.view(4, prompt=False, thinking=None)])[0]
    assert execute(go_template(learn(chats)), messages) == whole[: whole.rindex("The answer is") + 13]


def test_the_system_text_is_written_once(tmp_path: Path) -> None:
    for name in chat_templates.ENDS:
        template = go_template(learn(written(name, tmp_path / name)))
        prompt = execute(template, [*talk("Q", system="Sys"), *talk("A", "Q")[1:]])
        assert prompt.count("Sys") == 1, name


def test_the_start_token_is_left_to_llama_cpp(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, "<end>", bos="<s>")
    chats = ChatFormat(tokenizer, "{{ bos_token }}" + TEMPLATE)
    assert learn(chats, bos="<s>") == learn(ChatFormat(tokenizer, TEMPLATE))
    assert learn(chats).no_system == "<s>" and execute(go_template(learn(chats)), TEN[0]).startswith("<s>")


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def test_thinking_follows_the_request_or_stays_off_as_it_was_trained(tokenizer: Any) -> None:
    chats = ChatFormat(tokenizer, THINKING)
    for trained in (None, True):
        template = go_template(learn(chats, thinking=trained))
        for messages in TEN:
            for asked, means in ((True, True), (False, False), (None, trained)):
                assert execute(template, messages, think=asked) == expected(chats, messages, thinking=means)
    off = go_template(learn(chats, thinking=False))
    assert ".Think" not in off, "Ollama would take the model for one that thinks, and ask it to"
    for messages in TEN:
        assert execute(off, messages, think=True) == expected(chats, messages, thinking=False)


def test_reasoning_of_an_answer_that_goes_on_is_shown(tokenizer: Any) -> None:
    template = go_template(learn(ChatFormat(tokenizer, THINKING), thinking=True))
    messages = [*talk("Q"), {"role": "assistant", "content": "A", "thinking": "Hm"}]
    assert execute(template, messages).endswith("assistant\n<think>\nHm\n</think>\n\nA")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages | length }}", "leaves a message out"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes its text"),
        ("{% for m in messages %}<{{ loop.index }}>{{ m.content }}{% endfor %}", "first question in another way"),
        ("{% for m in messages %}<{{ m.role }}>{{ m.content | replace('\n', ' ') }}</>{% endfor %}", "in another way"),
        ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ '!' if messages | length > 5 }}</>{% endfor %}",
         "user, assistant, user, assistant, user"),
        ("{{ raise_exception('never') }}", "never"),
    ],
    ids=["none", "changed", "numbered", "newlines", "long", "refused"],
)  # fmt: skip
def test_a_template_of_another_kind_is_refused_with_what_differs(template: str, said: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=said):
        learn(ChatFormat(tokenizer, template))


def test_without_a_template_the_last_question_stands_alone() -> None:
    assert execute(PLAIN, talk("Q", "A", "Why?")) == "Why?"
    assert execute(PLAIN, talk("Q", system="Sys")) == "Sys\n\nQ"


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("chatml", ["<|im_start|>", "<|im_end|>"]),
        ("llama3", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
        ("gemma", ["<start_of_turn>", "<end_of_turn>"]),
        ("mistral", ["</s>", "[INST]"]),
        ("alpaca", ["</s>", "\n### Instruction:"]),
    ],
)
def test_stop_words_are_the_markers_of_turns(name: str, stops: list[str], tmp_path: Path) -> None:
    chats = written(name, tmp_path)
    special = [token for token, _ in sorted(chats.tokenizer.get_added_vocab().items(), key=lambda item: item[1])]
    assert stop_words(learn(chats), special) == stops


def test_a_marker_inside_another_is_no_stop_word() -> None:
    turns = Turns("<|user|>\n", "", "<|assistant|>\n", "<|end|>\n", "<|assistant|>\n")
    assert stop_words(turns, ["|", "\n", "<|", "<|user|>", "<|end|>", "<tool>"]) == ["<|user|>", "<|end|>"]


def test_a_modelfile_is_read_as_it_was_meant() -> None:
    system = 'You said: "Hi" \n\n  "quoted"\tand # no comment\nFROM nowhere \\n 東京"'
    template = '{{ range .Messages }}"{{ .Content }}"\n{{ end }} '
    text = Modelfile(
        "./model.gguf", "./adapter.gguf", template, system, ["<|im_end|>", '"', "\n### Q:"],
        {"temperature": 0.7, "num_ctx": 4096}, ["made\nFROM here"],
    ).text()  # fmt: skip
    for spelled in (text, text.replace("SYSTEM", "system").replace("PARAMETER", "Parameter")):
        assert read_modelfile(spelled) == [
            ("from", "./model.gguf"),
            ("adapter", "./adapter.gguf"),
            ("template", template),
            ("system", system),
            ("parameter", "temperature 0.7"),
            ("parameter", "num_ctx 4096"),
            ("parameter", "stop <|im_end|>"),
            ("parameter", 'stop "'),
            ("parameter", "stop \n### Q:"),
        ]


def test_any_text_comes_back_from_a_modelfile() -> None:
    draw = random.Random(0)
    pieces = ['"', '""', " ", "\n", "\t", "\\", "#", "FROM x", "{{", "}}", "'", "é", "a", "PARAMETER stop y", "\r\n"]
    for _ in range(3000):
        text = "".join(draw.choices(pieces, k=draw.randint(1, 9)))
        if '"""' in text:
            continue
        found = read_modelfile(Modelfile("./x.gguf", system=text, template=text, stops=[text]).text())
        assert [value for _, value in found[1:]] == [text, text, f"stop {text}"], repr(text)


def test_any_text_comes_back_from_a_template() -> None:
    for turns in any_turns(500):
        template = as_read(go_template(turns))
        for messages in (TEN[0], TEN[3], TEN[8]):
            assert execute(template, messages) == turns.render(collated(messages)[1]), (turns, template)


def test_what_a_modelfile_cant_say_is_refused_or_named() -> None:
    with pytest.raises(AdapterError, match="the system message has three quotation marks"):
        Modelfile("./x.gguf", system='a """ b').text()
    assert quoted('""', "x") == '""""""""' and read_modelfile(f"FROM x\nSYSTEM {quoted('', 'x')}")[1] == ("system", "")
    assert dropped("a\u00a0b\u200d\n\tc🙂") == ["U+00A0", "U+200D"]


def test_parameters_are_the_bases_and_the_context_holds_the_training_rows() -> None:
    generation = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1, "do_sample": True, "top_p": None}
    assert parameters(generation, 32768, 8192) == {
        "temperature": 0.6, "top_k": 20, "repeat_penalty": 1.1, "num_ctx": 8192,
    }  # fmt: skip
    assert parameters({}, 2048, 512) == {"num_ctx": 2048} and parameters({}, None, None) == {"num_ctx": 4096}


def test_messages_are_collated_as_ollama_does() -> None:
    system, merged = collated(TEN[8])
    assert system == "Be kind\n\nAnd more,\nof the same." and [m["role"] for m in merged[:2]] == ["system", "user"]
