"""Training is inference: the tokens before every learned answer are those that a chat sends at that turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mlx_lora.data.encode import Encoder
from mlx_lora.data.example import Example, conversation, without_images
from mlx_lora.models import template
from mlx_lora.serve.answer import prompt_tokens
from mlx_lora.serve.conversation import Trained
from tests.data.conftest import ANSWER, END, TALK, TOOLS, message
from tests.data.conversations import generated, learned

Make = Callable[..., Encoder]
THINKING = ("opening", "channel", "hiding", "switching")


@pytest.mark.parametrize("template", ["plain", "thinking", "bare", "rewriting", *THINKING])
def test_tokens_before_an_answer_are_what_a_chat_sends(encoder: Make, template: str) -> None:
    """Through the function that chat and generate call, with the thinking switch of the answer."""
    chosen = encoder(template)
    examples = generated(60, seed=3, tools=0, reasoning=0.4 if template in THINKING else 0)
    turns, faults = learned(chosen, examples)
    assert not faults and len(turns) > 150
    for example, index, before in turns:
        thinking = bool(example.messages[index].get("reasoning_content"))
        sent = prompt_tokens(chosen.tokenizer, example.messages[:index], Trained(thinking=thinking))
        assert before == sent


@pytest.mark.parametrize("template", ["opening", "channel", "switching"])
def test_conversations_with_tools_too(encoder: Make, template: str) -> None:
    chosen = encoder(template)
    turns, faults = learned(chosen, generated(200, seed=4))
    assert not faults and len(turns) > 600
    for example, index, before in turns:
        thinking = bool(example.messages[index].get("reasoning_content"))
        assert before == chosen.prompt(example.messages[:index], example.tools, thinking=thinking)


ROW = [message("user", "2+2?"), message("assistant", "4", reasoning_content="two twos")]
PLAIN = [message("user", "2+2?"), message("assistant", "4")]
ASKED = "<|user|>2+2?<|end|>\n<|assistant|>"


@pytest.mark.parametrize(
    ("template", "thinking", "messages", "prompt", "answer"),
    [
        # The prompt opens the block: a row with reasoning learns it and its end, one without learns an empty block.
        ("opening", "auto", ROW, "<think>\n", f"two twos\n</think>\n\n4{END}"),
        ("opening", "auto", PLAIN, "<think>\n\n</think>\n\n", f"4{END}"),
        ("opening", "on", PLAIN, "<think>\n", f"\n</think>\n\n4{END}"),
        ("opening", "off", PLAIN, "<think>\n\n</think>\n\n", f"4{END}"),
        # The prompt opens the block and no answer ever shows one.
        ("hiding", "auto", ROW, "<think>\n", f"two twos\n</think>\n\n4{END}"),
        ("hiding", "auto", PLAIN, "<think>\n", f"\n</think>\n\n4{END}"),
        # An empty channel where thinking is off, and none in the answer.
        ("channel", "auto", ROW, "", f"<|channel>thought\ntwo twos\n<channel|>4{END}"),
        ("channel", "auto", PLAIN, "<|channel>thought\n<channel|>", f"4{END}"),
        ("channel", "on", PLAIN, "", f"4{END}"),
        ("switching", "auto", ROW, "", f"<think>\ntwo twos\n</think>\n\n4{END}"),
        ("switching", "auto", PLAIN, "<think>\n\n</think>\n\n", f"4{END}"),
        ("switching", "on", PLAIN, "", f"<think>\n\n</think>\n\n4{END}"),
    ],
)
def test_a_row_with_reasoning_learns_it_and_one_without_answers_at_once(
    encoder: Make, template: str, thinking: str, messages: Any, prompt: str, answer: str
) -> None:
    chosen = encoder(template, thinking=thinking)
    ((tokens, weights),) = chosen.rows(conversation(messages))
    start = weights.index(1.0)
    assert chosen.tokenizer.decode(tokens[:start]) == ASKED + prompt
    assert chosen.tokenizer.decode(tokens[start:]) == answer


INLINE = message("assistant", "<think>\ntwo twos\n</think>\n\n4")


@pytest.mark.parametrize(
    "answer", [INLINE, message("assistant", "4", reasoning="two twos")], ids=["inline", "reasoning"]
)
@pytest.mark.parametrize("template", THINKING)
def test_every_spelling_of_reasoning_is_one_thing(encoder: Make, template: str, answer: Any) -> None:
    chosen = encoder(template)
    assert chosen.rows(conversation([ROW[0], answer])) == chosen.rows(conversation(ROW))


def test_reasoning_inside_a_text_stays_there_where_the_template_knows_none(encoder: Make) -> None:
    chosen = encoder("plain")
    ((tokens, _),) = chosen.rows(conversation([ROW[0], INLINE, *PLAIN]))
    assert chosen.tokenizer.decode(tokens).count("<think>\ntwo twos\n</think>\n\n4") == 1


HIDDEN = [
    ("plain", ROW, {}, r"doesn't show reasoning_content of message 2; data.drop=\[reasoning_content\]"),
    ("opening", ROW, {"thinking": "off"}, "doesn't show reasoning_content of message 2, with thinking off"),
    ("plain", [message("user", "2+2?", name="Anna"), PLAIN[1]], {}, "doesn't show name of message 1"),
    ("nothing", PLAIN, {}, "doesn't show content of message 1, content of message 2$"),
    (
        "short",
        [message("system", "yes"), message("user", "yes?"), message("assistant", "yes")],
        {},
        "content of message 1",
    ),
]


@pytest.mark.parametrize(("template", "messages", "settings", "said"), HIDDEN)
def test_what_the_template_leaves_out_is_named(
    encoder: Make, template: str, messages: Any, settings: Any, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        encoder(template, **settings).rows(conversation(messages))


@pytest.mark.parametrize(
    ("template", "messages", "settings", "drop"),
    [
        ("plain", ROW, {}, "reasoning_content"),
        ("opening", ROW, {"thinking": "off"}, "reasoning_content"),
        ("plain", [message("user", "2+2?", name="Anna"), PLAIN[1]], {}, "name"),
    ],
)
def test_what_was_agreed_to_is_left_out(encoder: Make, template: str, messages: Any, settings: Any, drop: str) -> None:
    agreed = encoder(template, drop=[drop], **settings).rows(conversation(messages))
    assert agreed == encoder(template, **settings).rows(conversation(PLAIN))


def test_lists_of_text_parts_are_joined_and_an_image_is_named(encoder: Make) -> None:
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    joined = encoder("plain").rows(conversation([message("user", parts), PLAIN[1]]))  # type: ignore[arg-type]
    assert joined == encoder("plain").rows(conversation([message("user", "2+\n2?"), PLAIN[1]]))
    image = [message("user", [{"type": "image_url", "image_url": {}}, *parts]), PLAIN[1]]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="message 1 .user. has a part of type 'image_url'.*data.drop=.images."):
        conversation(image)
    assert conversation(without_images(image)) == conversation([message("user", "2+\n2?"), PLAIN[1]])


def test_arguments_for_the_template_reach_it(encoder: Make) -> None:
    text = encoder("argued", template_args={"tone": "kind"})
    ((tokens, _),) = text.rows(conversation(PLAIN))
    assert text.tokenizer.decode(tokens).startswith("kind<|user|>")


def test_histories_that_agree_share_a_row_and_others_dont(encoder: Make) -> None:
    turns = [*PLAIN, message("user", "3+3?"), message("assistant", "6")]
    assert len(encoder("plain").rows(conversation(turns))) == 1
    assert len(encoder("opening").rows(conversation(turns))) == 2


def test_examples_come_in_their_order_however_they_are_encoded(encoder: Make) -> None:
    examples = [
        Example(text=f"text {i}") if i % 3 else conversation([message("user", f"{i}?"), PLAIN[1]]) for i in range(300)
    ]
    chosen = encoder("plain")
    together = [one.rows for one in chosen.encoded(examples)]
    assert together == [chosen.rows(example) for example in examples]
    assert replace(chosen).chat.reasoning == "unknown"


HEADER_PARTS = ["a", "t", "art", "assistant", "user", "end", "|", "<", "think", "<|assistant|>"[2:6]]


@pytest.mark.parametrize("content", HEADER_PARTS)
@pytest.mark.parametrize("template", [*THINKING, "plain", "thinking"])
def test_an_answer_that_looks_like_a_piece_of_its_header_is_learned_alone(
    encoder: Make, template: str, content: str
) -> None:
    chosen = encoder(template)
    for answer in (message("assistant", content), message("assistant", content, reasoning_content="two twos")):
        if "reasoning_content" in answer and template in ("plain", "thinking"):
            continue
        ((tokens, weights),) = chosen.rows(conversation([message("user", "2+2?"), answer]))
        learned_text = chosen.tokenizer.decode(tokens[weights.index(1.0) :])
        for known in ("<think>", "</think>", "two twos", "<|channel>thought", "<channel|>", "\n"):
            learned_text = learned_text.replace(known, "")
        assert learned_text == f"{content}{END}"


def test_a_tool_call_keeps_its_first_characters_where_the_prompt_opens_thinking(encoder: Make) -> None:
    """`<tool_call>` begins as `<think>` does."""
    asking = message(
        "assistant", "", tool_calls=[{"type": "function", "function": {"name": "rain", "arguments": "{}"}}]
    )
    chosen = encoder("calling")
    ((tokens, weights),) = chosen.rows(conversation([message("user", "rain?"), asking]))
    assert chosen.tokenizer.decode(tokens[weights.index(1.0) :]) == f"\n</think>\n\n<tool_call>rain</tool_call>{END}"


@pytest.mark.parametrize(
    "text", ["Use </think> to close", "Wrap it in <think>a</think> tags.", "`</think>`", "a </think>\nb"]
)
def test_a_mark_inside_an_answer_is_no_reasoning(encoder: Make, text: str) -> None:
    chosen = encoder("plain")
    ((tokens, weights),) = chosen.rows(conversation([message("user", "how?"), message("assistant", text)]))
    assert chosen.tokenizer.decode(tokens[weights.index(1.0) :]) == f"{text}{END}"


def test_reasoning_without_its_first_mark_is_reasoning(encoder: Make) -> None:
    answer = message("assistant", "two twos\n</think>\n\n4")
    assert encoder("opening").rows(conversation([ROW[0], answer])) == encoder("opening").rows(conversation(ROW))


def test_a_whole_conversation_follows_the_thinking_switch(encoder: Make) -> None:
    texts = {}
    for thinking in ("on", "off"):
        chosen = encoder("told", mask="all", thinking=thinking)
        ((tokens, _),) = chosen.rows(conversation(PLAIN))
        texts[thinking] = chosen.tokenizer.decode(tokens)
    assert texts["on"].startswith("think<|user|>") and texts["off"].startswith("quiet<|user|>")


def test_dropped_tool_calls_take_their_results_along(encoder: Make) -> None:
    turns = [*TALK, *ANSWER]
    ((tokens, _),) = encoder("toolless", drop=["tool_calls", "tools"]).rows(conversation(turns, tools=tuple(TOOLS)))
    assert "<|tool|>" not in encoder("toolless").tokenizer.decode(tokens)


def test_one_long_conversation_is_rendered_view_by_view_where_all_of_it_takes_too_long(
    encoder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template, "MOST_SECONDS", 0.4)
    chosen = encoder("slow")
    turns = [part for i in range(12) for part in (message("user", f"{i}?"), message("assistant", str(i)))]
    rows = chosen.rows(conversation(turns))
    assert sum(sum(weights) for _, weights in rows) == sum(len(str(i)) + 1 for i in range(12))
