"""Masks, the end token, truncation and splitting, checked by decoding exactly the tokens that carry loss."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_lora.config import Data
from mlx_lora.data.encode import Encoder
from mlx_lora.data.fit import EncodedFile, encode_file
from mlx_lora.models.open import load_tokenizer
from tests.data.conftest import ANSWER, CALLED, ROWS, TALK, TOOLS, example, message, shown

END = "<|end|>"
ALL = "all"  # every token but the first
Make = Callable[..., Encoder]

LEARNED = [
    ("text", "auto", ALL),
    ("text", "all", ALL),
    ("completions", "auto", [f"four{END}"]),
    ("completions", "completion", [f"four{END}"]),
    ("completions", "assistant", [f"four{END}"]),
    ("completions", "last", [f"four{END}"]),
    ("completions", "all", ALL),
    ("completion lists", "auto", [CALLED + END, f"It rains.{END}"]),
    ("completion lists", "completion", [CALLED + END, f"It rains.{END}"]),
    ("completion lists", "assistant", [f"hello{END}", CALLED + END, f"It rains.{END}"]),
    ("completion lists", "last", [f"It rains.{END}"]),
    ("completion lists", "all", ALL),
    ("messages", "auto", [f"hello{END}", CALLED + END, f"It rains.{END}"]),
    ("messages", "assistant", [f"hello{END}", CALLED + END, f"It rains.{END}"]),
    ("messages", "completion", [f"It rains.{END}"]),
    ("messages", "last", [f"It rains.{END}"]),
    ("messages", "all", ALL),
    ("alpaca", "auto", [f"4{END}"]),
    ("alpaca", "assistant", [f"Hi.{END}", f"4{END}"]),
    ("alpaca", "last", [f"4{END}"]),
    ("alpaca", "all", ALL),
    ("sharegpt", "auto", [f"hello{END}", f"no{END}"]),
    ("sharegpt", "completion", [f"no{END}"]),
    ("sharegpt", "all", ALL),
]


@pytest.mark.parametrize(("name", "mask", "learned"), LEARNED, ids=lambda value: value if type(value) is str else "")
def test_mask_learns_every_turn_it_names(encoder: Make, name: str, mask: str, learned: Any) -> None:
    chosen = encoder(mask=mask)
    whole, runs = shown(chosen, ROWS[name])
    if learned == ALL:
        ((tokens, _),) = chosen.rows(example(ROWS[name]))
        learned = [chosen.tokenizer.decode(tokens[1:])]
    assert runs == learned
    assert whole.endswith(learned[-1])


WHOLE = {
    "text": f"a plain text{END}",
    "completions": f"<|user|>two and two{END}\n<|assistant|>four{END}",
    "messages": (
        f"<|system|>Be brief.{END}\n<|user|>hi{END}\n<|assistant|>hello{END}\n<|user|>rain?{END}\n"
        f"<|assistant|>{CALLED}{END}\n<|tool|>yes{END}\n<|assistant|>It rains.{END}"
    ),
    "alpaca": (
        f"<|system|>Count.{END}\n<|user|>Hi?{END}\n<|assistant|>Hi.{END}\n<|user|>Add.\n\n2 2{END}\n<|assistant|>4{END}"
    ),
    "sharegpt": (
        f"<|system|>Be brief.{END}\n<|user|>hi{END}\n<|assistant|>hello{END}\n<|user|>rain?{END}\n<|assistant|>no{END}"
    ),
}


@pytest.mark.parametrize("mask", ["auto", "all"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_row_becomes_the_templates_text_up_to_the_end_token(encoder: Make, name: str, mask: str) -> None:
    assert shown(encoder(mask=mask), ROWS[name])[0] == WHOLE[name]


@pytest.mark.parametrize(
    ("name", "whole", "learned"),
    [
        ("text", f"a plain text{END}", f" plain text{END}"),
        ("completions", f"two and twofour{END}", f"four{END}"),
        ("alpaca alone", f"Add.\n\n2 2\n\n4{END}", f"4{END}"),
    ],
)
@pytest.mark.parametrize("template", ["plain", "none"])
def test_template_none_is_the_text_as_it_stands(
    encoder: Make, template: str, name: str, whole: str, learned: str
) -> None:
    text, runs = shown(encoder(template, template="none"), ROWS[name])
    assert text == whole
    assert len(runs) == 1 and runs[0].endswith(learned)
    assert name == "text" or runs == [learned]


@pytest.mark.parametrize(
    ("template", "settings", "name", "said"),
    [
        ("plain", {"template": "none"}, "messages", "template none needs text, or one prompt and one completion"),
        ("plain", {"template": "none"}, "alpaca", "template none needs text"),
        ("plain", {"template": "chat"}, "text", "template chat needs messages"),
        ("none", {}, "messages", "the tokenizer has no chat template"),
        ("none", {"template": "chat"}, "completions", "the tokenizer has no chat template"),
        ("plain", {"mask": "assistant"}, "text", "mask assistant needs an answer"),
        ("toolless", {}, "messages", r"doesn't show tool_calls of message 5; data.drop=\[tool_calls\]"),
    ],
)
def test_settings_that_do_not_fit_the_row(
    encoder: Make, template: str, settings: dict[str, Any], name: str, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        encoder(template, **settings).rows(example(ROWS[name]))


@pytest.mark.parametrize("adds_end", [False, True], ids=["bare tokenizer", "tokenizer that ends by itself"])
@pytest.mark.parametrize("template", ["none", "auto"])
@pytest.mark.parametrize("name", ["text", "completions", "alpaca alone"])
def test_the_end_token_comes_once_for_every_format(
    tokenizers: Callable[..., Any], name: str, template: str, adds_end: bool
) -> None:
    tokenizer = tokenizers("none" if template == "none" else "plain", adds_end=adds_end)
    ((tokens, weights),) = Encoder(tokenizer, Data(template=template)).rows(example(ROWS[name]))
    learned = [token for token, weight in zip(tokens, weights, strict=True) if weight]
    assert learned[-1] == tokenizer.eos_token_id
    assert learned.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("text", [f"a{END}", f"a{END}{END}"])
def test_the_end_token_comes_once_when_the_text_has_it(encoder: Make, text: str) -> None:
    assert shown(encoder(), {"text": text})[0] == f"a{END}"


TURNS = {"messages": [message("user", "a"), message("assistant", "b"), message("user", "c"), message("assistant", "d")]}


@pytest.mark.parametrize(
    ("template", "runs"),
    [
        # Both answers learn the form of a last answer, and history keeps the form that a chat would send.
        (
            "thinking",
            [
                (f"<|user|>a{END}\n<|assistant|>", f"<think></think>b{END}"),
                (f"<|user|>a{END}\n<|assistant|>b{END}\n<|user|>c{END}\n<|assistant|>", f"<think></think>d{END}"),
            ],
        ),
        # Each answer learns to end, which the template doesn't show between turns.
        (
            "bare",
            [
                ("user: a\nassistant: ", f"b\n{END}"),
                ("user: a\nassistant: b\nuser: c\nassistant: ", f"d\n{END}"),
            ],
        ),
        ("rewriting", [(f"<|user|>a{END}\n<|assistant|>", f"b{END}"), (f"\n<|user|>c{END}\n<|assistant|>", f"d{END}")]),
        ("answers", [("[a]", f"b{END}"), ("[c]", f"d{END}")]),
    ],
)
def test_templates_of_other_shapes(encoder: Make, template: str, runs: list[tuple[str, str]]) -> None:
    """Every answer follows what a chat would send; what shares its beginning shares a row."""
    chosen = encoder(template)
    found = []
    for tokens, weights in chosen.rows(example(TURNS)):
        starts = [i for i, weight in enumerate(weights) if weight and not weights[i - 1]]
        ends = [i for i, weight in enumerate(weights, start=1) if weight and (i == len(weights) or not weights[i])]
        for before, start, end in zip([0, *ends], starts, ends, strict=False):
            found.append((chosen.tokenizer.decode(tokens[before:start]), chosen.tokenizer.decode(tokens[start:end])))
    assert found == runs


@pytest.mark.parametrize(
    "row",
    [ROWS["messages"], ROWS["completion lists"], ROWS["sharegpt"] | {"tools": TOOLS}],
    ids=["messages", "completions", "sharegpt"],
)
def test_tools_reach_the_template_and_the_prompt(encoder: Make, row: dict[str, Any]) -> None:
    chosen = encoder("tools", mask="completion")
    whole, _ = shown(chosen, row)
    prompt = chosen.tokenizer.decode(chosen.prompt_tokens(example(row)))
    assert whole.startswith("rain<|system|>") and whole.startswith(prompt)


@pytest.mark.parametrize("row", [{"text": END}, {"prompt": "a", "completion": " "}], ids=["text", "completion"])
def test_a_row_without_loss_never_reaches_a_batch(encoder: Make, write_rows: Callable[..., Path], row: Any) -> None:
    encoded = encode(encoder(), write_rows, [row])
    assert not encoded.rows and len(encoded.problems) == 1


@pytest.mark.parametrize("mask", ["auto", "completion", "last"])
def test_nothing_after_the_last_answer_is_kept(encoder: Make, mask: str) -> None:
    row = {"messages": [*TURNS["messages"], message("user", "e")]}
    assert shown(encoder(mask=mask), row)[0] == shown(encoder(mask=mask), TURNS)[0]
    assert shown(encoder(mask="all"), row)[0].endswith(f"<|user|>e{END}\n")


def test_mask_all_needs_no_prefix(encoder: Make) -> None:
    whole, runs = shown(encoder("rewriting", mask="all"), ROWS["completions"])
    assert whole == f"Solved. <|user|>two and two{END}\n<|assistant|>four{END}"
    assert runs == [whole[1:]]


@pytest.mark.parametrize("settings", [{}, {"template": "none"}], ids=["chat", "none"])
@pytest.mark.parametrize("template", ["plain", "thinking", "bare", "answers", "none"])
@pytest.mark.parametrize("name", ["completions", "alpaca alone"])
def test_generation_starts_from_the_tokens_before_the_answer(
    encoder: Make, template: str, settings: dict[str, str], name: str
) -> None:
    chosen = encoder(template, **settings)
    ((tokens, weights),) = chosen.rows(example(ROWS[name]))
    assert chosen.prompt_tokens(example(ROWS[name])) == tokens[: weights.index(1.0)]


def merging_tokenizer(folder: Path, *, end: str | None) -> Any:
    """SentencePiece's habits: a space before every text, and `▁y` as one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = [*sorted(set("▁Q:yes\n")), "▁y"]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[("▁", "y")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | ({"eos_token": end} if end else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return load_tokenizer(folder)


def test_a_join_that_merges_keeps_the_prompts_tokens_and_the_text(tmp_path: Path) -> None:
    chosen = Encoder(merging_tokenizer(tmp_path, end=END), Data())
    row = {"prompt": "Q: ", "completion": "yes"}
    ((tokens, weights),) = chosen.rows(example(row))
    prompt = list(chosen.tokenizer.encode("Q: "))
    assert list(chosen.tokenizer.encode("Q: yes"))[: len(prompt)] != prompt, "the tokenizer has to merge here"
    assert tokens[: len(prompt)] == prompt == chosen.prompt_tokens(example(row))
    assert chosen.tokenizer.decode(tokens) == f"Q: yes{END}"
    assert weights == [0.0] * len(prompt) + [1.0] * (len(tokens) - len(prompt))


LONG_PROMPT = {"prompt": "p" * 100, "completion": "four"}
LONG_ANSWER = {"prompt": "p", "completion": "a" * 100}


def encode(chosen: Encoder, write_rows: Callable[..., Path], rows: list[Any]) -> EncodedFile:
    return encode_file(write_rows(rows), chosen)


@pytest.mark.parametrize(
    ("too_long", "row", "counts", "said"),
    [
        ("error", LONG_PROMPT, (0, 0, 0), "109 tokens, data.max_seq_length is 40"),
        ("drop", LONG_PROMPT, (0, 0, 1), None),
        ("truncate-start", LONG_PROMPT, (1, 1, 0), None),
        ("truncate-start", LONG_ANSWER, (1, 1, 0), None),
        ("truncate-end", LONG_PROMPT, (0, 0, 0), "no token carries loss after truncation"),
        ("truncate-end", LONG_ANSWER, (1, 1, 0), None),
        ("split", LONG_PROMPT, (0, 0, 0), "109 tokens, and too_long split is for plain text only"),
    ],
)
def test_no_long_row_disappears_in_silence(
    encoder: Make, write_rows: Callable[..., Path], too_long: str, row: Any, counts: tuple[int, ...], said: str | None
) -> None:
    encoded = encode(encoder(too_long=too_long, max_seq_length=40), write_rows, [row])
    assert (len(encoded.rows), encoded.truncated, encoded.dropped) == counts
    assert [said in problem.problem for problem in encoded.problems] == ([True] if said else [])
    assert len(encoded.rows) + encoded.dropped + len(encoded.problems) == 1


@pytest.mark.parametrize(
    ("too_long", "row", "kept"),
    [
        ("truncate-start", LONG_PROMPT, slice(-40, None)),
        ("truncate-start", LONG_ANSWER, slice(-40, None)),
        ("truncate-end", LONG_ANSWER, slice(40)),
    ],
)
def test_truncation_keeps_the_side_it_says_and_the_answers_end(
    encoder: Make, write_rows: Callable[..., Path], too_long: str, row: Any, kept: slice
) -> None:
    chosen = encoder(too_long=too_long, max_seq_length=40)
    ((tokens, weights),) = chosen.rows(example(row))
    (result,) = encode(chosen, write_rows, [row]).rows
    assert result.tokens.tolist() == tokens[kept]
    assert result.weights.tolist() == [0.0, *weights[kept][1:]]
    if too_long == "truncate-start":
        assert result.tokens[-1] == chosen.tokenizer.eos_token_id and result.weights[-1] == 1


@pytest.mark.parametrize("too_long", ["error", "drop", "truncate-start", "truncate-end", "split"])
def test_a_row_of_exactly_the_limit_is_left_alone(
    encoder: Make, write_rows: Callable[..., Path], too_long: str
) -> None:
    encoded = encode(encoder(too_long=too_long, max_seq_length=11), write_rows, [{"text": "0123456789"}])
    assert [len(row) for row in encoded.rows] == [11]
    assert (encoded.truncated, encoded.dropped, encoded.problems) == (0, 0, [])


@pytest.mark.parametrize("limit", [2, 3, 8, 32, 33, 500])
@pytest.mark.parametrize("length", [9, 64, 997])
def test_split_learns_every_token_once_and_gives_context(
    encoder: Make, write_rows: Callable[..., Path], limit: int, length: int
) -> None:
    text = "".join(random.Random(length).choices("abcdefgh", k=length))
    chosen = encoder(too_long="split", max_seq_length=limit)
    ((whole, _),) = chosen.rows(example({"text": text}))
    encoded = encode(chosen, write_rows, [{"text": text}])
    learned = [token for row in encoded.rows for token in row.tokens[row.weights > 0].tolist()]
    assert learned == whole[1:]
    seen = 0
    for row in encoded.rows:
        context = int(np.argmax(row.weights > 0))
        assert 2 <= len(row) <= limit and context >= 1
        start = seen + 1 - context
        assert row.tokens.tolist() == whole[start : start + len(row)]
        assert row.weights[context:].all()
        seen += row.trained
    assert (encoded.truncated, encoded.dropped, encoded.problems) == (0, 0, [])


def test_bad_rows_do_not_take_good_ones_along(encoder: Make, write_rows: Callable[..., Path]) -> None:
    rows = [{"messages": TALK + ANSWER}, {"messages": [message("developer", "x"), *ANSWER]}, TURNS]
    encoded = encode(encoder(), write_rows, rows)
    assert len(encoded.rows) == 2
    assert [(problem.line, "refuses this conversation" in problem.problem) for problem in encoded.problems] == [
        (2, True)
    ]


def test_a_tokenizer_without_an_end_token_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no end token"):
        Encoder(merging_tokenizer(tmp_path, end=None), Data()).rows(example({"text": "yes"}))
